"""Running a study: training points, then their maps, then the summary; all of it resumable.

OUT holds `models/KEY/` (training points), `points/` (map points), `plan.json` (which maps go on
which model), `results.json`, `report.html` and figures. One command at a time works in it.
"""

import csv
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

from dvpa.ablate.jobs import Job, Say, run_jobs
from dvpa.ablate.measure import POINTS, is_measured, model_key
from dvpa.ablate.models import DONE
from dvpa.ablate.study import MapVariant, Study
from dvpa.evaluate.replacing import write_atomically

MODELS = "models"
# Of a training point's time; the rest is outcomes.
_TRAINING_SHARE = 0.85
_MEASURE_WEIGHT = 0.03  # of a model, against its training
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Trainable(Protocol):
    """A checked training point, see `dvpa_train.point.Resolved`."""

    @property
    def key(self) -> str:
        """Of its folder."""

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""

    def write(self, folder: Path) -> None:
        """Make the folder ready for the training command."""


Points = Mapping[tuple[str, int], Trainable]  # by recipe variant and seed


def run_points(
    study: Study,
    out: Path,
    points: Points,
    train_command: Sequence[str],
    say: Say,
    show: Say = lambda text: None,
) -> None:
    """Train and measure what is missing.

    Args:
        train_command: gets a point's folder as its last argument.

    Raises:
        ValueError: another command works in `out`, or a point failed.
    """
    with only_one(out):
        jobs: list[Job] = []
        plan: dict[str, dict[str, list[object]]] = {}
        for seed in study.seeds:
            for recipe in study.recipes:
                point = points[recipe.name, seed]
                if point.key in plan:  # two variants that come to the same
                    plan[point.key]["maps"] += [asdict(v) for v in study.maps_of(recipe.name)]
                    continue
                plan[point.key] = {"maps": [asdict(v) for v in study.maps_of(recipe.name)]}
                jobs += _jobs(study, out, recipe.name, seed, point, train_command)
        write_atomically(out / "plan.json", json.dumps(plan, indent=1))
        trainings = [job for job in jobs if job.after is None]
        done = sum(job.is_done() for job in trainings)
        what, maps = f"{len(study.configurations)} configurations", ""
        if study.architectures:
            what = f"{len(study.architectures)} architectures"
        else:
            maps = f", {len(study.configurations) * len(study.seeds)} map points"
        say(
            f"{what} x {len(study.seeds)} seeds: {len(trainings)} trainings ({done} done){maps}; "
            f"{study.workers} processes of one thread"
        )
        environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
        # What is quick comes first: results grow while the rest is trained.
        jobs.sort(key=lambda job: job.after is None)
        failed = run_jobs(jobs, study.workers, say, show, environment)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} jobs failed, first {failed[0].name}: see "
            f"{failed[0].log}; the same command goes on with what is missing"
        )


def _jobs(
    study: Study,
    out: Path,
    recipe: str,
    seed: int,
    point: Trainable,
    train_command: Sequence[str],
) -> list[Job]:
    """Training, then measuring where there are maps."""
    folder = out / MODELS / point.key
    done = folder / DONE
    if not done.is_file():
        point.write(folder)
    train = Job(
        name=f"{recipe}, seed {seed}",
        command=[*train_command, str(folder)],
        log=folder / "log.txt",
        is_done=done.is_file,
        progress=partial(_progress, folder, point.steps),
    )
    if study.architectures:
        return [train]
    variants = study.maps_of(recipe)
    measure = Job(
        name=f"maps on {recipe}, seed {seed}",
        command=[sys.executable, "-m", "dvpa.ablate.measure", str(out), point.key],
        log=folder / "measure.txt",
        is_done=partial(_all_measured, out, point.key, variants),
        after=train,
        weight=_MEASURE_WEIGHT,
    )
    return [train, measure]


def _all_measured(out: Path, model: str, variants: Sequence[MapVariant]) -> bool:
    if not (out / POINTS / f"{model_key(model)}.json").is_file():
        return False
    return all(is_measured(out, model, variant) for variant in variants)


def _progress(folder: Path, steps: int) -> float:
    """The share of a training point that is done, by the log of its steps."""
    try:
        with (folder / "logs" / "metrics.csv").open(newline="") as file:
            *_, last = csv.reader(file)
        return _TRAINING_SHARE * min(int(last[0]) / steps, 1.0)
    except (OSError, ValueError, IndexError):  # nothing yet, or a line half written
        return 0.0


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """ValueError if another command works in `out`; the lock ends with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another `dvpa ablate` works in it") from None
        yield
