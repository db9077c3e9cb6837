"""lm-eval over a dvpa engine in this process: any of its tasks, at one tier or routed.

`DvpaLM` is lm-eval's model interface. With `tier="auto"` each context is routed by the engine's
tier map, then its continuations are scored, or its answer generated, at the tier it got. A task's
documents without a prompt (rolling log-likelihoods) cannot be routed.

Needs lm-eval (`pip install 'dvpa[eval]'`), which nothing else in dvpa imports.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dvpa.engine import Engine, QueueFull, RequestOutput, SamplingParams
from dvpa.engine.outputs import Piece, TokenLogprob
from dvpa.pricing import price
from dvpa.tiers.policy import tier_index

MAX_GEN_TOKENS = 256  # where a task does not say: lm-eval's own default
_YAML = (".yaml", ".yml")
_NAME = re.compile(r"^(?:task|group):\s*['\"]?([\w.-]+)", flags=re.MULTILINE)
# generation_kwargs of a task -> fields of SamplingParams
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
_IGNORED = {"do_sample", "until", "max_gen_toks", "num_beams", "use_cache"}


class DvpaLM(TemplateLM):
    """A dvpa engine as lm-eval's model.

    Args:
        engine: with a tokenizer.
        tier: a tier's name or index, or "auto".

    `tiers` counts requests by the tier they ran at, `activated_params` sums what each of their
    tokens activated, `tokens` counts those.
    """

    def __init__(self, engine: Engine, tier: int | str = "auto") -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("tokenizer: the checkpoint has none")
        names = engine.model.config.tier_names
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.tier = tier if tier == "auto" else tier_index(tier, names)
        self.tiers: Counter[str] = Counter()
        self.activated_params, self.tokens = 0.0, 0
        self._activated = {t.name: t.activated_params for t in price(engine.model.config).tiers}
        self._routed: dict[tuple[int, ...], int] = {}

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Positions of the context."""
        return int(self.engine.model.config.max_position_embeddings)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """As prompts are encoded everywhere: the begin-of-sequence token first."""
        ids = list(self.tokenizer.encode(string, add_special_tokens=False))
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, answer) for _, context, answer in requests]
        tiers = self._tiers_of([context for context, _ in pairs])
        return self._score(pairs, tiers)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context.

        Raises:
            ValueError: the tier is "auto": there is no prompt to route.
        """
        if self.tier == "auto":
            raise ValueError("tier: auto cannot score a text without a prompt; name a tier")
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(total for total, _ in self._score(pairs, [self.tier] * len(pairs))))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a task's stop strings; greedy unless the task samples.

        Raises:
            ValueError: a generation setting that the engine does not know.
        """
        prompts, params = [], []
        for context, settings in (request.args for request in requests):
            wanted = self._sampling(settings)
            room = self.max_length - (wanted.max_tokens or 0)
            if room < 1:
                raise ValueError(
                    f"max_gen_toks: {wanted.max_tokens} must be below the context of "
                    f"{self.max_length}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(wanted)
        return [output.text for output in self._generate(prompts, params)]

    def _sampling(self, settings: dict[str, Any]) -> SamplingParams:
        unknown = sorted(set(settings) - _IGNORED - set(_SAMPLING))
        if unknown:
            raise ValueError(f"generation_kwargs: {', '.join(unknown)} is not known to the engine")
        until = settings.get("until") or []
        given = {
            k: make(settings[k]) for k, make in _SAMPLING.items() if settings.get(k) is not None
        }
        if not settings.get("do_sample", given.get("temperature", 0.0) > 0.0):
            given["temperature"] = 0.0
        return SamplingParams(
            **{"temperature": 0.0, **given},
            tier=self.tier,
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            max_tokens=int(settings.get("max_gen_toks", MAX_GEN_TOKENS)),
            allow_degradation=False,
        )

    def _fit(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """What fits the context, cut on the left, as lm-eval's other models do."""
        room = self.max_length - 1 - len(answer)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(answer)} tokens must leave room in the context of "
                f"{self.max_length}"
            )
        return context[-room:], answer

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], tiers: Sequence[int | str]
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the likeliest) of the second parts."""
        params = [
            SamplingParams(
                tier=tier, temperature=0.0, max_tokens=1, prompt_logprobs=1, allow_degradation=False
            )
            for tier in tiers
        ]
        outputs = self._generate([[*context, *answer] for context, answer in pairs], params)
        found = []
        for (context, _), output in zip(pairs, outputs, strict=True):
            assert output.prompt_logprobs is not None
            tokens = [t for t in output.prompt_logprobs[len(context) :] if t is not None]
            total = sum(token.logprob for token in tokens)
            found.append((total, all(map(_is_likeliest, tokens))))
        return found

    def _tiers_of(self, contexts: Sequence[list[int]]) -> Sequence[int | str]:
        if self.tier != "auto":
            return [self.tier] * len(contexts)
        new = dict.fromkeys(key for key in map(tuple, contexts) if key not in self._routed)
        self._routed |= zip(new, route(self.engine, [list(key) for key in new]), strict=True)
        return [self._routed[tuple(context)] for context in contexts]

    def _generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        outputs = self.engine.generate(prompts, params) if prompts else []
        for output in outputs:
            record = output.telemetry
            if output.finish_reason not in ("stop", "length"):
                raise ValueError(f"tier {record.tier_name}: a request ended early: {output.error}")
            tokens = record.prompt_tokens + record.completion_tokens - 1
            self.tiers[record.tier_name] += 1
            self.tokens += tokens
            self.activated_params += self._activated[record.tier_name] * tokens
        return outputs


def route(engine: Engine, prompts: Sequence[list[int]]) -> list[int]:
    """The tier that the policy would give each prompt; nothing is generated."""
    tiers: list[int] = [-1] * len(prompts)
    waiting, left = list(enumerate(prompts))[::-1], len(prompts)

    def take(number: int, piece: Piece) -> None:
        nonlocal left
        if piece.finish_reason is None:
            return
        left -= 1
        if piece.telemetry is None or piece.finish_reason != "stop":
            raise ValueError(f"a request was not routed: {piece.error}")
        tiers[number] = piece.telemetry.tier

    params = SamplingParams(max_tokens=1, allow_degradation=False)
    while left:
        with suppress(QueueFull):  # the step makes room
            while waiting:
                number, prompt = waiting[-1]
                engine.add(
                    prompt,
                    params,
                    listener=lambda piece, number=number: take(number, piece),
                    only_routes=True,
                )
                waiting.pop()
        engine.step()
    return tiers


def evaluate(
    engine: Engine,
    tasks: Sequence[str],
    tiers: Sequence[int | str] = ("auto",),
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks at every tier asked for.

    Args:
        tasks: names known to lm-eval, or YAML files of tasks (whose folders are searched too).
        limit: documents of each task.

    Returns:
        Per tier {results: lm-eval's, by task; tier_share; mean_activated_params: per token}.

    Raises:
        FileNotFoundError: no such YAML file.
        ValueError: an unknown task or tier, a task that does not load or cannot be run.
    """
    names, folders = _local(tasks)
    models = {str(tier): DvpaLM(engine, tier) for tier in tiers}
    has_named = any(Path(task).suffix not in _YAML for task in tasks)
    manager = TaskManager(include_path=folders or None, include_defaults=has_named)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks: lm-eval knows no {', '.join(unknown)}")
    found = {}
    for tier, model in models.items():
        done = simple_evaluate(
            model,
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        assert done is not None  # only a rank above 0 gets nothing
        total = sum(model.tiers.values())
        found[tier] = {
            "results": {name: dict(row) for name, row in done["results"].items()},
            "tier_share": {
                name: model.tiers[name] / total if total else 0.0
                for name in engine.model.config.tier_names
            },
            "mean_activated_params": model.activated_params / max(model.tokens, 1),
        }
    return found


def _local(tasks: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of tasks, those of YAML files read from them; and the files' folders."""
    names, folders = [], []
    for task in tasks:
        path = Path(task)
        if path.suffix not in _YAML:
            names.append(task)
            continue
        if not path.is_file():
            raise FileNotFoundError(f"tasks: {task}: no such file")
        named = _NAME.search(path.read_text(encoding="utf-8"))
        if named is None:
            raise ValueError(f"tasks: {task}: has neither task nor group")
        names.append(named.group(1))
        folders.append(str(path.resolve().parent))
    return names, list(dict.fromkeys(folders))


def _is_likeliest(token: TokenLogprob) -> bool:
    return token.logprob >= max(token.top.values(), default=token.logprob)
