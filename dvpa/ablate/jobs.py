"""Jobs as processes: a few at a time, each leaving a mark when it is done.

A job that is done is not run again, so a study that was killed goes on with what is missing. A job
that fails does not stop the others.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0  # a training saves before it ends

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A command, and how to see whether it is done.

    weight: how long it takes, against other jobs. progress: the share done, while it runs.
    """

    name: str
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    after: "Job | None" = None
    weight: float = 1.0
    progress: Callable[[], float] = field(default=lambda: 0.0)


@dataclass
class _Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    began: float
    share: float  # done by an earlier start


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    say: Say,
    show: Say = lambda text: None,
    environment: dict[str, str] | None = None,
) -> list[Job]:
    """Run what is not done, `workers` at a time; returns the jobs that failed.

    A job waits for the one it comes `after`, and is given up if that fails. `say` gets a line per
    event, `show` the state of things, often. On any exception the processes are ended.
    """
    waiting = [job for job in jobs if not job.is_done()]
    failed: list[Job] = []
    running: list[_Running] = []
    clock = _Clock(list(jobs), workers)
    try:
        while waiting or running:
            for place in [r for r in running if r.process.poll() is not None]:
                running.remove(place)
                seconds = time.monotonic() - place.began
                if place.process.returncode == 0 and place.job.is_done():
                    clock.finished(place.job, seconds, place.share)
                    say(f"{place.job.name}: done in {_minutes(seconds)}")
                else:
                    failed.append(place.job)
                    say(f"{place.job.name}: failed ({_last_line(place.job.log)})")
            given_up = [job for job in waiting if job.after in failed]
            failed += given_up
            waiting = [job for job in waiting if job not in given_up]
            for job in list(waiting):
                if len(running) >= workers:
                    break
                if job.after is None or job.after.is_done():
                    waiting.remove(job)
                    running.append(_start(job, environment))
            show(clock.describe(waiting, running))
            time.sleep(POLL_SECONDS)
    except BaseException:
        _stop([place.process for place in running])
        raise
    return failed


def _start(job: Job, environment: dict[str, str] | None) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    share = job.progress()
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    return _Running(job, process, time.monotonic(), share)


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Clock:
    """How long it will still take, from what has been done in this start."""

    def __init__(self, jobs: list[Job], workers: int) -> None:
        self._jobs, self._workers = jobs, workers
        self._weight = self._seconds = 0.0

    def finished(self, job: Job, seconds: float, share: float) -> None:
        self._weight += job.weight * (1.0 - share)
        self._seconds += seconds

    def describe(self, waiting: Sequence[Job], running: Sequence[_Running]) -> str:
        done = sum(job.is_done() for job in self._jobs)
        now = time.monotonic()
        weight, seconds = self._weight, self._seconds
        left = sum(job.weight for job in waiting)
        names = []
        for place in running:
            share = min(place.job.progress(), 1.0)
            weight += place.job.weight * max(share - place.share, 0.0)
            seconds += now - place.began
            left += place.job.weight * (1.0 - share)
            names.append(f"{place.job.name} {share:.0%}")
        text = f"{done}/{len(self._jobs)} jobs"
        if names:
            text += f"; {', '.join(names)}"
        if weight > 0.05 and left:
            text += f"; about {_minutes(left * seconds / weight / self._workers)} left"
        return text


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1][-200:] if lines else 'no output'}; see {log}"
