"""Run every tier over a task set: model in, `OutcomeTable` out.

Quality of a task is exact match under greedy decoding, from ONE teacher-forced pass per tier: the
greedy answer equals the reference if and only if every reference token, eos included, is the argmax
after the reference tokens before it. That holds at token level; a verifier that accepts other
spellings of an answer may score the same model higher.

Left out: sampling, verifiers, generation longer than the reference (an answer that differs has
already failed). Letters: `B` sequences, `T` tokens, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dvpa.evaluate.table import OutcomeTable
from dvpa.tasks.encoding import encode_tasks, left_pad, right_pad
from dvpa.tasks.task_set import Task

__all__ = ["OutcomeTable", "collect_entropy", "collect_outcomes", "collect_text_nll"]

Progress = Callable[[int, int], None]  # (sequences done, sequences in total)

# Tokens beyond the longest reference that a wrong base-tier answer may take when its uncertainty is
# measured.
_EXTRA_TOKENS = 2


def collect_outcomes(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    batch_size: int = 256,
    progress: Progress | None = None,
    uncertainty: bool = False,
    prompt_tier: int | None = None,
) -> OutcomeTable:
    """Outcomes of every tier of `model` on `tasks` (a TaskSet, or any sequence of Task).

    `prompt_tier`: the tier that reads the prompt up to its last token, as `answer` does with the
    base tier (0) for requests it routes; None: the answering tier reads it too.

    Difficulty is read from the prompt tokens alone (NaN without a head). `uncertainty=True` also
    decodes the base tier's wrong answers, for the cascade baseline. Deterministic; the model is
    left in the mode it was in. ValueError for no tasks, or a task longer than the model's context.
    """
    pairs = encode_tasks(tokenizer, tasks)
    table = _collect(model, pairs, batch_size, progress, prompt_tier)
    table = replace(
        table,
        ids=[task.id for task in tasks],
        kind=[task.kind for task in tasks],
        level=np.array([task.level for task in tasks], dtype=np.int64),
    )
    if uncertainty:
        table = replace(table, uncertainty=_base_uncertainty(model, table, pairs, batch_size))
    return table


def collect_text_nll(
    model: Any,
    tokenizer: Any,
    chunks: Sequence[str],
    batch_size: int = 32,
    prompt_fraction: float = 0.5,
    progress: Progress | None = None,
) -> OutcomeTable:
    """Per-tier nll of plain text: the first `prompt_fraction` of each chunk's tokens is the prompt
    (what the difficulty is read from), the rest is scored. Quality is exp(-(nll_t - nll_top)+), so
    the top tier's is 1 by definition.
    """
    if not 0 < prompt_fraction < 1:
        raise ValueError(f"prompt_fraction must lie in (0, 1), got {prompt_fraction}")
    pairs = []
    for number, chunk in enumerate(chunks):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(chunk, add_special_tokens=False)]
        cut = max(1, round(prompt_fraction * len(ids)))
        if cut >= len(ids):
            raise ValueError(
                f"chunk {number} must hold at least one token to score after its prompt"
            )
        pairs.append((ids[:cut], ids[cut:]))
    table = _collect(model, pairs, batch_size, progress)
    excess = np.maximum(table.nll - table.nll[:, -1:], 0.0)
    return replace(table, quality=np.exp(-excess), kind=["text"] * len(pairs))


def collect_entropy(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 256
) -> npt.NDArray[np.float64]:
    """Entropy, in nats, of the base tier's distribution of the first answer token [N].

    What the pass that scores a prompt knows anyway; no answer is decoded.
    """
    prompts = [prompt for prompt, _ in encode_tasks(tokenizer, tasks)]
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    entropy = np.empty(len(prompts))
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = left_pad([prompts[row] for row in rows], pad_id=0)
            output = model(
                torch.from_numpy(ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                tiers=0,
                use_cache=False,
                logits_to_keep=1,
            )
            log_p = output.logits[:, -1].float().log_softmax(dim=-1)
            entropy[rows] = -(log_p.exp() * log_p).sum(dim=-1).double().cpu().numpy()
    return entropy


def _collect(
    model: Any,
    pairs: list[tuple[list[int], list[int]]],
    batch_size: int,
    progress: Progress | None,
    prompt_tier: int | None = None,
) -> OutcomeTable:
    """Table of exact matches and mean nll per answer token; ids are positions, kinds empty."""
    if not pairs:
        raise ValueError("tasks must hold at least one task")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    num_requests, num_tiers = len(pairs), int(model.config.num_tiers)
    prompt_tokens = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)
    answer_tokens = np.array([len(answer) for _, answer in pairs], dtype=np.int64)
    longest = int((prompt_tokens + answer_tokens).max())
    if longest > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(
            f"tasks must fit max_position_embeddings {limit}, the longest has {longest}"
        )
    quality = np.zeros((num_requests, num_tiers))
    nll = np.zeros((num_requests, num_tiers))
    difficulty = np.full(num_requests, np.nan)
    order = np.argsort(
        prompt_tokens + answer_tokens, kind="stable"
    )  # like lengths together: little padding
    with _evaluating(model):
        for start in range(0, num_requests, batch_size):
            rows = order[start : start + batch_size]
            batch = [pairs[row] for row in rows]
            for tier in range(num_tiers):
                quality[rows, tier], nll[rows, tier] = _teacher_forced(
                    model, batch, tier, prompt_tier
                )
            difficulty[rows] = _difficulty(model, [prompt for prompt, _ in batch])
            if progress is not None:
                progress(start + len(rows), num_requests)
    return OutcomeTable(
        ids=[str(row) for row in range(num_requests)],
        level=np.zeros(num_requests, dtype=np.int64),
        kind=[""] * num_requests,
        prompt_tokens=prompt_tokens,
        quality=quality,
        nll=nll,
        difficulty=difficulty,
        completion_tokens=np.repeat(answer_tokens[:, None], num_tiers, axis=1),
    )


def _teacher_forced(
    model: Any, batch: list[tuple[list[int], list[int]]], tier: int, prompt_tier: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(exact match [B], mean nll per answer token [B]) of one right-padded pass at `tier`."""
    # pad_id is masked out everywhere below; any valid id will do.
    ids, mask = right_pad([prompt + answer for prompt, answer in batch], pad_id=0)
    answers = np.zeros_like(mask, dtype=bool)
    for index, (prompt, answer) in enumerate(batch):
        answers[index, len(prompt) : len(prompt) + len(answer)] = True
    device = model.device
    input_ids = torch.from_numpy(ids).to(device)
    tiers: int | torch.Tensor = tier
    if prompt_tier is not None:
        last = torch.tensor([[len(prompt) - 1] for prompt, _ in batch])
        tiers = torch.where(torch.arange(ids.shape[1]) < last, prompt_tier, tier).to(device)
    output = model(
        input_ids, attention_mask=torch.from_numpy(mask).to(device), tiers=tiers, use_cache=False
    )
    # Keep only positions that predict an answer token: [A, V] with A = answer tokens of the batch.
    is_answer = torch.from_numpy(answers[:, 1:]).to(device)
    logits = output.logits[:, :-1][is_answer].float()
    targets = input_ids[:, 1:][is_answer]
    token_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    correct = logits.argmax(dim=-1) == targets
    sequence = np.nonzero(answers[:, 1:])[0]
    lengths = np.bincount(sequence, minlength=len(batch))
    hits = np.bincount(sequence, weights=correct.cpu().numpy(), minlength=len(batch))
    total = np.bincount(sequence, weights=token_nll.double().cpu().numpy(), minlength=len(batch))
    return (hits == lengths).astype(float), total / lengths


def _difficulty(model: Any, prompts: list[list[int]]) -> npt.NDArray[np.float64]:
    """Raw difficulty [B] from the prompt tokens only; NaN without a head."""
    if model.difficulty_head is None:
        return np.full(len(prompts), np.nan)
    ids, mask = left_pad(prompts, pad_id=0)
    device = model.device
    head = model.score(
        torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
    )
    return np.asarray(head.difficulty.double().cpu().numpy())


def _base_uncertainty(
    model: Any,
    table: OutcomeTable,
    pairs: list[tuple[list[int], list[int]]],
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """Mean nll [N] of the base tier's own greedy answer.

    A right answer is the reference, whose nll is known; only wrong ones are decoded. Nothing about
    the reference leaks into the signal, except that decoding stops a few tokens past the longest
    reference.
    """
    result = table.nll[:, 0].copy()
    limit = int(table.completion_tokens.max()) + _EXTRA_TOKENS
    wrong = np.flatnonzero(table.quality[:, 0] < 0.5)
    wrong = wrong[np.argsort(table.prompt_tokens[wrong], kind="stable")]
    eos = int(model.config.eos_token_id)
    with _evaluating(model):
        for start in range(0, len(wrong), batch_size):
            rows = wrong[start : start + batch_size]
            ids, mask = left_pad([pairs[row][0] for row in rows], pad_id=0)
            output = model.generate(
                torch.from_numpy(ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                tiers=0,
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=eos,
                pad_token_id=eos,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens = output.sequences[:, ids.shape[1] :]  # [B, new]
            logits = torch.stack(output.logits, dim=1).float()  # [B, new, V]
            chosen = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
            is_eos = (tokens == eos).int()
            counted = is_eos.cumsum(dim=1) - is_eos == 0  # up to the first eos, itself included
            mean = -(chosen * counted).sum(dim=1) / counted.sum(dim=1)
            result[rows] = mean.double().cpu().numpy()
    return result


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, the previous mode restored."""
    was_training = bool(model.training)
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
