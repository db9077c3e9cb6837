"""Answers with telemetry, through Transformers' own `generate`: load, score, choose a tier, decode.

A request that the policy routes is read once, by the base tier: that pass gives the difficulty, and
its keys and values are kept. The prompt's last token and the answer then run at the chosen tier,
over a cache another tier has written, which training prepares for (`switch_fraction`). A request
with a tier of its own (`tier=...`), or without a usable score, is read by the tier that answers.

One request at a time; no queue, no escalation while decoding (those belong to the engine).
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.cache_utils import DynamicCache

from dvpa.config import DvpaConfig
from dvpa.model.cache_name import CACHE_NAME
from dvpa.model.causal_lm import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tasks import encoding
from dvpa.tasks.chat import encode_chat
from dvpa.tiers.policy import Decision
from dvpa.tiers.record import TelemetryRecord


@dataclass(frozen=True)
class Answer:
    """The text of one completion, its token ids (without the prompt), and its telemetry record."""

    text: str
    token_ids: list[int]
    telemetry: TelemetryRecord


class _Words(TextIteratorStreamer):
    """Streams whole words only, so that what has gone out never reads otherwise later.

    One invalid byte turns the run of byte tokens that it is in into replacement characters; a space
    ends such a run. Transformers' own streamer, from 5.24 on, does not wait for it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **decode_kwargs: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, **decode_kwargs)
        self._token_ids: list[int] = []
        self._is_prompt = True
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._token_ids.extend(value.flatten().tolist())
        text = self._text()
        self._send(text[: text.rfind(" ") + 1], False)

    def end(self) -> None:
        """What is left."""
        self._send(self._text(), True)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._token_ids, **self.decode_kwargs))

    def _send(self, text: str, is_end: bool) -> None:
        news, self._sent = text[self._sent :], max(self._sent, len(text))
        self.on_finalized_text(news, stream_end=is_end)


def load(checkpoint: str | Path) -> tuple[DvpaForCausalLM, PreTrainedTokenizerBase]:
    """Model (eval mode) and tokenizer of a checkpoint folder.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the checkpoint is incomplete, corrupt or of another model type.
    """
    folder = Path(checkpoint)
    for part in (folder, folder / "config.json"):
        if not part.exists():
            raise FileNotFoundError(f"{part}: no such checkpoint")
    config = DvpaConfig.from_pretrained(folder)
    model = DvpaForCausalLM.from_pretrained(folder, config=config).eval()
    if not (folder / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"{folder}: the checkpoint has no tokenizer")
    # A special token spelt out in a prompt is text like any other.
    return model, AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


def decide(
    model: DvpaForCausalLM, input_ids: torch.Tensor, tier: int | str = "auto"
) -> tuple[Decision, float]:
    """Tier of one tokenised prompt [1, S] and the milliseconds that scoring it took."""
    start = time.perf_counter()
    difficulty = None
    if tier == "auto" and model.difficulty_head is not None:
        with torch.inference_mode():
            difficulty = float(model.score(input_ids).difficulty)
    decision = model.policy.decide(difficulty, tier=tier)
    return decision, 1000 * (time.perf_counter() - start)


def read_prompt(model: DvpaForCausalLM, input_ids: torch.Tensor) -> tuple[float, DynamicCache]:
    """One base-tier pass over a prompt [1, S]: difficulty, and the cache of its first S - 1 tokens.

    Raises:
        ValueError: the model has no difficulty head.
    """
    if model.config.difficulty is None:
        raise ValueError("difficulty: this checkpoint has no difficulty head")
    with torch.inference_mode():
        out = model.model(input_ids, tiers=0, use_cache=True, output_hidden_states=True)
        states = out.layer_states[model.config.difficulty.probe_layer]
        head = model.assess(states, torch.ones_like(input_ids))
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(out.past_key_values.layers):
            cache.update(layer.keys[..., :-1, :], layer.values[..., :-1, :], index)
    return float(head.difficulty), cache


def encode_prompt(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False
) -> torch.Tensor:
    """Token ids [1, S] of a prompt, begin-of-sequence first.

    `chat`: as a user's turn, written by the tokenizer's chat template.

    Raises:
        ValueError: the prompt is empty or longer than the model's context, or `chat` is asked for
            and there is no chat template.
    """
    if not prompt.strip():
        raise ValueError("prompt: must not be empty")
    if chat:
        ids = encode_chat(tokenizer, [("user", prompt)], generation_prompt=True)
    else:
        ids = encoding.encode_prompt(tokenizer, prompt)
    limit = model.config.max_position_embeddings
    if len(ids) >= limit:
        raise ValueError(f"prompt: {len(ids)} tokens must be fewer than the context of {limit}")
    return torch.tensor([ids], device=model.device)


def stream(
    model: DvpaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tier: int | str = "auto",
    max_new_tokens: int = 64,
    chat: bool = False,
    **sampling: Any,
) -> Iterator[str | Answer]:
    """Yield the answer's text piece by piece as it is decoded, then the whole `Answer`.

    `chat`: the prompt is a user's turn, see `encode_prompt`. `sampling` goes to `generate` (greedy
    by default). Decoding stops at the end of the context.

    Raises:
        ValueError: empty or too long prompt, unknown tier, `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be 1 or more")
    begin = time.perf_counter()
    input_ids = encode_prompt(model, tokenizer, prompt, chat)
    room = model.config.max_position_embeddings - input_ids.shape[1]
    difficulty, cache, score_ms = None, None, 0.0
    if tier == "auto" and model.difficulty_head is not None:
        difficulty, cache = read_prompt(model, input_ids)
        score_ms = 1000 * (time.perf_counter() - begin)
    decision = model.policy.decide(difficulty, tier=tier)
    if decision.decided_by == "fallback" or input_ids.shape[1] == 1:
        cache = None
    streamer = _Words(tokenizer, skip_special_tokens=True)
    result: list[torch.Tensor | BaseException] = []

    def decode() -> None:
        try:
            result.append(
                model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    tiers=torch.tensor([decision.tier], device=input_ids.device),
                    max_new_tokens=min(max_new_tokens, room),
                    streamer=streamer,
                    **{CACHE_NAME: cache, "do_sample": False, **sampling},
                )
            )
        except BaseException as error:
            result.append(error)
            streamer.end()

    worker = Thread(target=decode, daemon=True)
    worker.start()
    first_ms = None
    for piece in streamer:
        if first_ms is None:
            first_ms = 1000 * (time.perf_counter() - begin)
        if piece:
            yield piece
    worker.join()
    output = result[0]
    if isinstance(output, BaseException):
        raise output
    token_ids = output[0, input_ids.shape[1] :].tolist()
    total_ms = 1000 * (time.perf_counter() - begin)
    yield Answer(
        text=tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
        token_ids=token_ids,
        telemetry=_record(
            model,
            decision,
            input_ids.shape[1],
            len(token_ids),
            score_ms,
            first_ms or total_ms,
            total_ms,
            routed=cache is not None,
        ),
    )


def answer(
    model: DvpaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tier: int | str = "auto",
    max_new_tokens: int = 64,
    chat: bool = False,
    **sampling: Any,
) -> list[Answer]:
    """One `Answer` per prompt, each at its own tier; arguments and errors as in `stream`."""
    answers = []
    for prompt in prompts:
        *_, last = stream(model, tokenizer, prompt, tier, max_new_tokens, chat, **sampling)
        assert isinstance(last, Answer)
        answers.append(last)
    return answers


def _record(
    model: DvpaForCausalLM,
    decision: Decision,
    prompt_tokens: int,
    completion_tokens: int,
    score_ms: float,
    ttft_ms: float,
    total_ms: float,
    routed: bool,
) -> TelemetryRecord:
    model_price = price(model.config)
    tier_price = model_price.tiers[decision.tier]
    # The head ran, also where its score was unusable and the policy fell back. The last token is
    # produced but never fed back.
    scored = decision.decided_by != "override" and model.difficulty_head is not None
    read = model_price.tiers[0].flops_per_token * prompt_tokens
    scoring = read + model_price.head_flops_per_request if scored else 0
    decoded = completion_tokens if routed else prompt_tokens + max(completion_tokens - 1, 0)
    tier_tokens = [0] * model.config.num_tiers
    tier_tokens[decision.tier] = completion_tokens
    return TelemetryRecord(
        request_id=uuid.uuid4().hex,
        tier=decision.tier,
        tier_name=decision.tier_name,
        difficulty=decision.difficulty,
        success_by_tier=decision.success_by_tier,
        decided_by=decision.decided_by,
        thresholds=decision.thresholds,
        activated_params=tier_price.activated_params,
        flops=float(scoring + tier_price.flops_per_token * decoded),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        tier_tokens=tuple(tier_tokens),
        escalations=0,
        queue_ms=0.0,
        score_ms=score_ms,
        ttft_ms=ttft_ms,
        total_ms=total_ms,
    )
