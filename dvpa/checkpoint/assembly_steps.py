"""Carries out the steps of an assembly plan: read, compare, combine, write; chunk by chunk.

One `StepRunner` per thread. It holds one chunk of each parent and of the result, so memory depends
neither on the model's size nor on a tensor's.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from dvpa.checkpoint.assembly_plan import BLOCK, CHUNK_BYTES, Plan
from dvpa.checkpoint.interpolate import PAD, Bytes, Scratch, Sums, are_equal, combine
from dvpa.checkpoint.shard_files import ShardFiles
from dvpa.checkpoint.step_table import COPIED, EQUAL, KEPT, MERGED, Outcome, Step


class ParentFiles:
    """The parents' shards, open for reading at any place by any thread."""

    def __init__(self, plan: Plan) -> None:
        self._parents = plan.parents
        self._lock = Lock()
        self._open: dict[Path, int] = {}
        self.bytes_read = 0

    def read(self, parent: int, name: str, position: int, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes from `position` on.

        Raises:
            ValueError: the file has become shorter.
        """
        path, offset = self._parents[parent].locate(name)
        offset += position
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            descriptor = self._open[path]
            self.bytes_read += len(into)
        while into:
            count = os.preadv(descriptor, [into], offset)
            if count == 0:
                raise ValueError(f"{path}: {name}: the file ends inside of it")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class StepRunner:
    """One worker. `files` is None where nothing is to be written (a dry run).

    `compare_all` also measures tensors whose fate does not depend on their difference.
    """

    def __init__(
        self, plan: Plan, parents: ParentFiles, files: ShardFiles | None, compare_all: bool
    ) -> None:
        self._plan, self._parents, self._files = plan, parents, files
        self._compare_all = compare_all
        self._base = plan.recipe.base_index
        self._scratch = Scratch()
        self._loaded: dict[int, tuple[str, int, int]] = {}

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Decide about the steps of a unit together, and do it.

        Raises:
            ValueError: a value that is not finite, or a file that cannot be read.
            OSError: the disk is full or fails.
        """
        rule = self._plan.rule(steps[0])
        sources = [i for i, share in enumerate(rule.shares) if share > 0]
        if sources == [self._base]:
            return [self._copy(step, Outcome(COPIED, self._base)) for step in steps]
        is_mixed = len(sources) > 1
        has_limit = rule.delta > 0 or (rule.expert_delta > 0 and steps[0].expert is not None)
        if is_mixed and not has_limit:
            return self._merge(steps, sources)
        if not (has_limit or self._compare_all or is_mixed):
            return [self._copy(step, Outcome(COPIED, sources[0])) for step in steps]
        sums = [self._measure(step, sources) for step in steps]
        is_small = rule.expert_delta > 0 and _difference(steps, sums) < rule.expert_delta
        return [
            self._settle(step, measured, is_small, sources)
            for step, measured in zip(steps, sums, strict=True)
        ]

    def _settle(self, step: Step, sums: Sums | None, is_small: bool, sources: list[int]) -> Outcome:
        """What follows from a step's difference; `is_small`: its expert's is below the limit."""
        if sums is None:  # no numbers to compare: all bytes or none
            parent = self._base if self._is_same(step, sources) else sources[0]
            return self._copy(step, Outcome(EQUAL if parent == self._base else COPIED, parent))
        difference, relative = _difference([step], [sums]), _relative(sums)
        if sums.is_equal or is_small or difference < self._plan.rule(step).delta:
            action = EQUAL if sums.is_equal else KEPT
            return self._copy(step, Outcome(action, self._base, difference, relative))
        if len(sources) == 1:
            return self._copy(step, Outcome(COPIED, sources[0], difference, relative))
        return self._merge([step], sources)[0]

    def _copy(self, step: Step, outcome: Outcome) -> Outcome:
        if self._files is not None:
            assert outcome.parent is not None
            for start, size in _chunks(step, step.info.num_bytes):
                part = self._load(outcome.parent, step.name, start, size)
                self._files.write(step.name, start, part.data[:size])
            if step.scale is not None:
                size = self._scale_bytes(step)
                part = self._load(outcome.parent, step.scale, 0, size)
                self._files.write(step.scale, 0, part.data[:size])
        return outcome

    def _measure(self, step: Step, sources: Sequence[int]) -> Sums | None:
        """Sums over a tensor; None where its values cannot be computed with."""
        return self._combine([step], sources, False)[0] if step.can_combine else None

    def _merge(self, steps: Sequence[Step], sources: Sequence[int]) -> list[Outcome]:
        outcomes = []
        for step, sums in zip(
            steps, self._combine(steps, sources, self._files is not None), strict=True
        ):
            action, parent = (EQUAL, self._base) if sums.is_equal else (MERGED, None)
            difference = _difference([step], [sums])
            outcomes.append(Outcome(action, parent, difference, _relative(sums)))
        return outcomes

    def _combine(self, steps: Sequence[Step], sources: Sequence[int], write: bool) -> list[Sums]:
        """Sums of a tensor, or of several that lie one after the other in one chunk."""
        needed = sorted({self._base, *sources})
        first, shares = steps[0], self._plan.rule(steps[0]).shares
        totals = [Sums([0.0] * len(shares), is_equal=True) for _ in steps]
        scales = self._scales(first, needed)
        ends = list(accumulate(step.info.num_bytes for step in steps))
        for start, size in _chunks(first, ends[-1]):
            parts = {i: self._load(i, first.name, start, size) for i in needed}
            out = self._scratch.take("out", parts[self._base].nbytes) if write else None
            if first.scale is not None:
                found = [self._combine_fp8(first, start, size, parts, scales, out)]
            else:
                cuts = ends if len(steps) > 1 else [size]
                found = combine(
                    first.info.dtype, parts, cuts, self._base, shares, out, self._scratch
                )
            for step, total, sums in zip(steps, totals, found, strict=True):
                if not np.isfinite(sums.differences).all():
                    raise ValueError(f"{self._blamed(sums)}: {step.name}: not finite")
                total.add(sums)
            if out is not None and self._files is not None:
                self._files.write(first.name, start, out.data[:size])
        if write and first.scale is not None and self._files is not None:
            scale = self._scratch.take("out scale", self._scale_bytes(first))
            self._files.write(first.scale, 0, scale.data)
        return totals

    def _combine_fp8(
        self,
        step: Step,
        start: int,
        size: int,
        parts: Mapping[int, Bytes],
        scales: Mapping[int, NDArray[np.float32]],
        out: Bytes | None,
    ) -> Sums:
        from dvpa.checkpoint.interpolate_fp8 import combine_fp8  # loads torch: for FP8 alone

        columns = step.info.shape[1]
        first, last = (-(-place // (columns * BLOCK)) for place in (start, start + size))
        rows = {i: part[:size].reshape(-1, columns) for i, part in parts.items()}
        bands = {i: scale[first:last] for i, scale in scales.items()}
        written = None
        if out is not None:
            wide = -(-columns // BLOCK)
            whole = self._scratch.take("out scale", self._scale_bytes(step), np.float32)
            written = (out[:size].reshape(-1, columns), whole.reshape(-1, wide)[first:last])
        return combine_fp8(rows, bands, self._base, self._plan.rule(step).shares, written)

    def _scales(self, step: Step, needed: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """The parents' scales of an FP8 weight."""
        if step.scale is None:
            return {}
        size, wide = self._scale_bytes(step), -(-step.info.shape[1] // BLOCK)
        scales = {}
        for parent in needed:
            raw = self._scratch.take(f"scale {parent}", size)
            self._parents.read(parent, step.scale, 0, raw.data)
            scales[parent] = raw.view(np.float32).reshape(-1, wide)
        return scales

    def _scale_bytes(self, step: Step) -> int:
        assert step.scale is not None
        return step.num_bytes - step.info.num_bytes

    def _load(self, parent: int, name: str, start: int, size: int) -> Bytes:
        """A chunk of a parent, padded with zeros; read again only if it is not here already."""
        padded = -(-size // PAD) * PAD
        part = self._scratch.take(f"parent {parent}", padded)
        if self._loaded.get(parent) != (name, start, size):
            self._loaded.pop(parent, None)
            self._parents.read(parent, name, start, part.data[:size])
            part[size:] = 0
            self._loaded[parent] = (name, start, size)
        return part

    def _is_same(self, step: Step, sources: Sequence[int]) -> bool:
        """Whether the parents hold the same bytes."""
        needed = sorted({self._base, *sources})
        return all(
            are_equal({i: self._load(i, step.name, start, size) for i in needed}, self._base)
            for start, size in _chunks(step, step.info.num_bytes)
        )

    def _blamed(self, sums: Sums) -> Path:
        """The parent to blame for a difference that is not finite."""
        wrong = [i for i, value in enumerate(sums.differences) if not math.isfinite(value)]
        only_base = not math.isfinite(sums.base)
        return self._plan.parents[self._base if only_base else wrong[0]].folder


def _chunks(step: Step, total: int) -> Iterator[tuple[int, int]]:
    """(start, size) in bytes of a tensor, and of those after it; FP8 in whole rows of blocks."""
    size = CHUNK_BYTES
    if step.scale is not None:
        band = step.info.shape[1] * BLOCK
        size = max(1, CHUNK_BYTES // max(band, 1)) * band
    for start in range(0, total, size or 1):
        yield start, min(size, total - start)


def _difference(steps: Sequence[Step], sums: Sequence[Sums | None]) -> float:
    """Root mean square over all the steps' elements, of the parent that differs most."""
    counts = [math.prod(step.info.shape) for step in steps]
    measured = [(n, s) for n, s in zip(counts, sums, strict=True) if s is not None]
    if not measured or not sum(n for n, _ in measured):
        return 0.0
    totals = [sum(each) for each in zip(*(s.differences for _, s in measured), strict=True)]
    return math.sqrt(max(totals) / sum(n for n, _ in measured))


def _relative(sums: Sums) -> float | None:
    if not math.isfinite(sums.base) or sums.base <= 0:
        return None
    return math.sqrt(max(sums.differences) / sums.base)
