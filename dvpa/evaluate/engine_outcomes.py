"""Run every tier over a task set through the engine: what a routed request would get, and cost.

Each request is answered once per tier, greedily, by a tier map that knows that tier alone: the
prompt is scored and read as it is in production (`read_prompt`), and the answer is checked by the
task's own verifier. Tasks `by_nll`, and the nll column, come from the prompt's log-probabilities
over question and answer, which the tier reads alone.

`outcomes.collect_outcomes` is the fast way for training: teacher-forced, exact match only.

Rows are appended to a JSON Lines file chunk by chunk; the same call goes on where a killed one
stopped. Chunks are run by themselves, so that whether a run was interrupted changes nothing but the
milliseconds, which are those of a request among `max_num_seqs` of the same tier.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.engine import Engine, RequestOutput, SamplingParams
from dvpa.evaluate.replacing import write_atomically
from dvpa.evaluate.table import OutcomeTable
from dvpa.pricing import price
from dvpa.tasks.encoding import encode_tasks
from dvpa.tasks.task_set import Task, verify
from dvpa.tiers.tier_map import NEVER, TierMap

logger = logging.getLogger(__name__)

VERSION = 1
CHUNK = 64  # requests between two writes
Progress = Callable[[int, int], None]  # (requests done, requests in total)
Pair = tuple[list[int], list[int]]  # prompt ids, answer ids


@dataclass(frozen=True)
class OutcomeRun:
    """Outcomes of a task set, and what was left out of it."""

    table: OutcomeTable
    path: Path
    num_resumed: int  # requests that an earlier call had done
    num_too_long: int  # tasks that do not fit the context


def run_outcomes(
    engine: Engine,
    tasks: Sequence[Task],
    path: str | Path,
    *,
    model_id: str = "",
    max_tokens: int | None = None,
    with_nll: bool = True,
    progress: Progress | None = None,
) -> OutcomeRun:
    """Every tier of the engine's model on `tasks`, written to `path` (JSON Lines) on the way.

    Args:
        model_id: tells apart the checkpoints that may write to the same path, see `checkpoint_id`.
        max_tokens: of an answer; None: twice the longest reference, 16 at least.
        with_nll: also score every reference, which takes another pass per tier.

    Raises:
        ValueError: no tasks, or none that fits; an engine that caches prefixes (their tokens would
            cost nothing); `path` holds another run; a request that fails.
    """
    if engine.config.prefix_caching:
        raise ValueError("prefix_caching: must be off, or what is cached would cost nothing")
    if not tasks:
        raise ValueError("tasks must hold at least one task")
    if len({task.id for task in tasks}) < len(tasks):
        raise ValueError("tasks: the same question comes twice")
    if engine.tokenizer is None:
        raise ValueError("tokenizer: the checkpoint has none")
    is_base_read = engine.config.read_prompt == "base"
    if is_base_read and any(task.by_nll for task in tasks):
        raise ValueError("read_prompt: a text scored by nll is read by one tier, not by base")
    pairs = encode_tasks(engine.tokenizer, tasks)
    if max_tokens is None:
        max_tokens = max(16, 2 * max(len(answer) for _, answer in pairs))
    fitting = _fitting(engine, tasks, pairs, max_tokens)
    if not fitting:
        raise ValueError(f"tasks: none of {len(tasks)} fits the context with {max_tokens} more")
    kept = [(tasks[i], pairs[i]) for i in fitting]
    settings = {
        "version": VERSION,
        "model": model_id,
        "tiers": list(engine.model.config.tier_names),
        "dtype": str(engine.model.dtype),
        "tasks": _digest([task for task, _ in kept]),
        "num_requests": len(kept),
        "max_tokens": max_tokens,
        "read_prompt": engine.config.read_prompt,
        "max_num_seqs": engine.config.max_num_seqs,
        "with_nll": with_nll,
    }
    path = Path(path)
    done = _claim(path, settings)
    runner = _Chunks(engine, max_tokens, with_nll)
    tier_map = engine.policy.tier_map
    try:
        for start in range(done, len(kept), CHUNK):
            chunk = kept[start : start + CHUNK]
            table = runner.run([task for task, _ in chunk], [pair for _, pair in chunk])
            _append(path, table)
            if progress is not None:
                progress(start + len(chunk), len(kept))
    finally:
        engine.set_tier_map(tier_map)
    too_long = len(tasks) - len(kept)
    if too_long:
        logger.warning("%d of %d tasks exceed the context: left out", too_long, len(tasks))
    return OutcomeRun(OutcomeTable.load_jsonl(path), path, done, too_long)


def checkpoint_id(folder: str | Path) -> str:
    """Tells a checkpoint from another by its config and its weight files' headers and sizes."""
    digest = hashlib.sha256()
    folder = Path(folder)
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def constant_map(tier_map: TierMap, tier: int) -> TierMap:
    """A fitted map with the same tiers that sends every request to one of them."""
    above = tier_map.num_tiers - 1 - tier
    cuts = (0.0,) * tier + (NEVER,) * above
    return TierMap("threshold", tier_map.tier_names, tier_map.costs, tier, thresholds=cuts)


class _Chunks:
    """Runs the tiers over one chunk of tasks after the other."""

    def __init__(self, engine: Engine, max_tokens: int, with_nll: bool) -> None:
        self.engine, self.max_tokens, self.with_nll = engine, max_tokens, with_nll
        self.price = price(engine.model.config)
        self.activated = np.array([tier.activated_params for tier in self.price.tiers], dtype=float)
        self.is_base_read = engine.config.read_prompt == "base"

    def run(self, tasks: Sequence[Task], pairs: Sequence[Pair]) -> OutcomeTable:
        """The outcomes of some tasks."""
        size, num_tiers = len(tasks), len(self.activated)
        prompt_tokens = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)
        wide = {name: np.full((size, num_tiers), np.nan) for name in ("quality", "nll", "flops")}
        wide["ms"] = np.full((size, num_tiers), np.nan)
        tokens = np.repeat(np.array([[len(answer)] for _, answer in pairs]), num_tiers, axis=1)
        difficulty, uncertainty = np.full(size, np.nan), np.full(size, np.nan)
        score_ms = np.zeros(size)
        asked = [i for i, task in enumerate(tasks) if not task.by_nll]
        scored = [i for i, task in enumerate(tasks) if task.by_nll or self.with_nll]
        for tier in range(num_tiers):
            answers = self._answers(tier, tasks, pairs, asked if tier else range(size))
            for i, answer in answers.items():
                record = answer.telemetry
                if tier == 0 and record.difficulty is not None:
                    difficulty[i] = record.difficulty
                if tasks[i].by_nll:
                    score_ms[i] = record.score_ms
                    continue
                wide["quality"][i, tier] = verify(tasks[i], answer.text)
                tokens[i, tier] = record.completion_tokens
                wide["flops"][i, tier] = record.flops
                wide["ms"][i, tier] = record.total_ms - record.queue_ms
                if tier == 0:
                    uncertainty[i] = -np.mean([token.logprob for token in answer.logprobs])
            for i, (nll, ms) in self._nll(tier, pairs, scored).items():
                wide["nll"][i, tier] = nll
                if tasks[i].by_nll:
                    length = int(prompt_tokens[i] + tokens[i, tier] - 1)
                    flops = length * self.price.tiers[tier].flops_per_token
                    extra = self.price.scoring_flops(int(prompt_tokens[i]), tier)
                    wide["flops"][i, tier] = flops + extra
                    wide["ms"][i, tier] = ms + score_ms[i]
        by_nll = np.array([task.by_nll for task in tasks])
        excess = np.maximum(wide["nll"] - wide["nll"][:, -1:], 0.0)
        wide["quality"][by_nll] = np.exp(-excess[by_nll])
        return OutcomeTable(
            ids=[task.id for task in tasks],
            level=np.array([task.level for task in tasks], dtype=np.int64),
            kind=[task.kind for task in tasks],
            prompt_tokens=prompt_tokens,
            difficulty=difficulty,
            uncertainty=uncertainty,
            completion_tokens=tokens,
            activated_params=self._activated(prompt_tokens, tokens),
            **wide,
        )

    def _answers(
        self, tier: int, tasks: Sequence[Task], pairs: Sequence[Pair], rows: Sequence[int]
    ) -> dict[int, RequestOutput]:
        """The greedy answers of one tier, with logprobs at the base tier (its uncertainty).

        A task by nll is only scored: its answer is one token.
        """
        self.engine.set_tier_map(constant_map(self.engine.policy.tier_map, tier))
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1 if tasks[i].by_nll else self.max_tokens,
                logprobs=0 if tier == 0 else None,
                allow_degradation=False,
                allow_escalation=False,
            )
            for i in rows
        ]
        return self._generate([pairs[i][0] for i in rows], params, rows)

    def _nll(
        self, tier: int, pairs: Sequence[Pair], rows: Sequence[int]
    ) -> dict[int, tuple[float, float]]:
        """(mean nats per answer token, milliseconds) of the reference answers at one tier."""
        params = SamplingParams(
            temperature=0.0, max_tokens=1, tier=tier, prompt_logprobs=0, allow_degradation=False
        )
        prompts = [[*pairs[i][0], *pairs[i][1]] for i in rows]
        found = {}
        for i, output in self._generate(prompts, [params] * len(rows), rows).items():
            assert output.prompt_logprobs is not None
            scored = output.prompt_logprobs[len(pairs[i][0]) :]
            nll = -float(np.mean([token.logprob for token in scored if token is not None]))
            found[i] = nll, output.telemetry.total_ms - output.telemetry.queue_ms
        return found

    def _generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], rows: Sequence[int]
    ) -> dict[int, RequestOutput]:
        outputs = self.engine.generate(prompts, params) if prompts else []
        for output in outputs:
            if output.finish_reason not in ("stop", "length"):
                name = output.telemetry.tier_name
                raise ValueError(f"tier {name}: a request ended early: {output.error}")
        return dict(zip(rows, outputs, strict=True))

    def _activated(
        self, prompt_tokens: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """[N, T] mean over the tokens that a request passes through the model."""
        if not self.is_base_read:
            return np.tile(self.activated, (len(tokens), 1))
        read = (prompt_tokens - 1)[:, None].astype(float)
        total = self.activated[0] * read + self.activated * tokens
        return np.asarray(total / (read + tokens))


def _fitting(
    engine: Engine, tasks: Sequence[Task], pairs: Sequence[Pair], max_tokens: int
) -> list[int]:
    """Tasks whose question and answer, given or generated, fit the context."""
    context = engine.model.config.max_position_embeddings
    return [
        i
        for i, (prompt, answer) in enumerate(pairs)
        if len(prompt) + max(len(answer), 0 if tasks[i].by_nll else max_tokens) < context
    ]


def _digest(tasks: Sequence[Task]) -> str:
    """Of questions (their ids), answers and how they are judged, in order."""
    digest = hashlib.sha256()
    for task in tasks:
        line = {name: value for name, value in asdict(task).items() if name != "where"}
        digest.update(json.dumps(line, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _claim(path: Path, settings: dict[str, Any]) -> int:
    """How many requests an earlier call with the same settings has done, in whole chunks.

    Raises:
        ValueError: the file belongs to other tasks, another checkpoint or other settings.
    """
    note = path.with_suffix(".run.json")
    if path.is_file():
        before = json.loads(note.read_text()) if note.is_file() else {}
        changed = sorted(k for k in settings if before.get(k) != settings[k])
        if changed:
            raise ValueError(
                f"{path}: holds a run with other {', '.join(changed)}; choose another folder or "
                "delete it"
            )
        lines = path.read_bytes().splitlines(keepends=True)
        whole = sum(line.endswith(b"\n") for line in lines)
        if whole < settings["num_requests"]:  # a kill may have come in the middle of a chunk
            whole = whole // CHUNK * CHUNK
        if whole < len(lines):
            os.truncate(path, sum(len(line) for line in lines[:whole]))
        return whole
    write_atomically(note, json.dumps(settings, indent=1) + "\n")
    return 0


def _append(path: Path, table: OutcomeTable) -> None:
    lines = [json.dumps(table.record(row), allow_nan=False) + "\n" for row in range(len(table))]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
