"""Assembly of Experts: a new checkpoint from several parents of one architecture, tensor by tensor.

Each tensor is a convex combination of the parents' (arXiv 2506.14794), with the shares of the first
rule of the recipe that takes it; tensors that hardly differ stay the base's, byte for byte. Works
on safetensors headers and never builds a model: names, dtypes, shard layout and tensors that no
model class knows survive. Linear in the data, in constant memory; PyTorch is loaded only if FP8
weights have to be combined.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

from dvpa.checkpoint.assembly_output import check_room, finish_folder
from dvpa.checkpoint.assembly_plan import Plan, plan_assembly
from dvpa.checkpoint.assembly_report import AssemblyReport, build_report
from dvpa.checkpoint.assembly_steps import ParentFiles, StepRunner
from dvpa.checkpoint.folders import resumable_folder
from dvpa.checkpoint.recipe import Recipe, load_recipe
from dvpa.checkpoint.shard_files import ShardFiles
from dvpa.checkpoint.step_table import Outcome, Outcomes, Step

Progress = Callable[[int], object]


def assemble(
    recipe: Recipe | Path | str,
    out: Path | str,
    threads: int | None = None,
    compare: bool = True,
    on_progress: Progress | None = None,
) -> AssemblyReport:
    """Write the checkpoint that `recipe` describes to the new folder `out`.

    `out` appears complete or not at all. A run that was killed or failed leaves `<out>.incomplete`
    with the shards that were done; the same call goes on from there.

    Args:
        recipe: a `Recipe` or its file.
        out: a new folder.
        threads: tensors worked on at the same time (default: one per CPU).
        compare: also read tensors of the base only to report how far others are from them.
        on_progress: called with a number of finished bytes, again and again, from any thread.

    Raises:
        FileNotFoundError: a parent, or a file of it, is missing.
        ValueError: a bad recipe; parents that do not fit together; a damaged shard; `out` not
            empty. The message names the key or the tensor.
        OSError: the disk is full or fails.
    """
    return assemble_plan(_plan(recipe), out, threads, compare, on_progress)


def survey(
    recipe: Recipe | Path | str,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> AssemblyReport:
    """What `assemble` would do, with all differences; nothing is written."""
    return survey_plan(_plan(recipe), threads, on_progress)


def assemble_plan(
    plan: Plan,
    out: Path | str,
    threads: int | None = None,
    compare: bool = True,
    on_progress: Progress | None = None,
) -> AssemblyReport:
    """`assemble` with a plan at hand."""
    started = time.perf_counter()
    with resumable_folder(Path(out), plan.identity()) as folder:
        files = ShardFiles(folder, plan.base)
        parents = ParentFiles(plan)
        resumed = len(files.finished)
        try:
            check_room(folder, plan.base, files)
            outcomes = Outcomes(len(plan.steps))
            _recall(plan, files, outcomes, on_progress)
            _run(plan, parents, files, outcomes, threads, compare, on_progress)
            files.close()
        except BaseException:
            files.abandon()
            raise
        finally:
            parents.close()
        seconds = time.perf_counter() - started
        report = build_report(plan, outcomes, seconds, parents.bytes_read, resumed)
        finish_folder(folder, plan, report, outcomes, files.finished)
    return report


def survey_plan(
    plan: Plan, threads: int | None = None, on_progress: Progress | None = None
) -> AssemblyReport:
    """`survey` with a plan at hand."""
    started = time.perf_counter()
    parents = ParentFiles(plan)
    outcomes = Outcomes(len(plan.steps))
    try:
        _run(plan, parents, None, outcomes, threads, True, on_progress)
    finally:
        parents.close()
    return build_report(plan, outcomes, time.perf_counter() - started, parents.bytes_read, 0)


def _plan(recipe: Recipe | Path | str) -> Plan:
    return plan_assembly(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def _recall(
    plan: Plan, files: ShardFiles, outcomes: Outcomes, on_progress: Progress | None
) -> None:
    """Take over what an earlier run remembers of the tensors whose files it has finished."""
    if not files.finished:
        return
    shard, records = "", dict[str, Any]()
    for step in plan.steps:
        names = [step.name] if step.scale is None else [step.name, step.scale]
        if not all(files.is_finished(name) for name in names):
            continue
        if (name := files.shard_of(step.name)) != shard:
            shard, records = name, files.records(name)
        outcomes[step.number] = Outcome(*records[step.name])
        if on_progress is not None:
            on_progress(step.num_bytes)


def _run(
    plan: Plan,
    parents: ParentFiles,
    files: ShardFiles | None,
    outcomes: Outcomes,
    threads: int | None,
    compare: bool,
    on_progress: Progress | None,
) -> None:
    """Fill in the outcomes that are None; the first failure stops every thread."""
    units = (unit for unit in plan.steps.units() if not outcomes.are_known(unit))
    lock, stop = Lock(), Event()

    def work() -> None:
        runner = StepRunner(plan, parents, files, compare)
        while not stop.is_set():
            try:
                with lock:
                    unit = next(units, None)
                if unit is None:
                    return
                results = runner.run(unit)
                for step, outcome in zip(unit, results, strict=True):
                    _finish(files, step, outcome)
            except BaseException:
                stop.set()
                raise
            for step, outcome in zip(unit, results, strict=True):
                if outcomes[step.number] is None and on_progress is not None:
                    on_progress(step.num_bytes)
                outcomes[step.number] = outcome

    count = threads or len(os.sched_getaffinity(0))
    with _single_threaded_torch(plan), ThreadPoolExecutor(count) as pool:
        try:
            jobs = [pool.submit(work) for _ in range(count)]
            for job in jobs:
                job.result()
        except BaseException:  # an interrupt, too
            stop.set()
            raise


def _finish(files: ShardFiles | None, step: Step, outcome: Outcome) -> None:
    if files is not None:
        files.finish(step.name, outcome)
        if step.scale is not None:
            files.finish(step.scale)


@contextmanager
def _single_threaded_torch(plan: Plan) -> Iterator[None]:
    """Our threads share out the tensors; PyTorch's would only fight with them."""
    if not plan.steps.num_scales:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
