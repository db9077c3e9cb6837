"""The multi-node rehearsal: train on two nodes, lose one, get it back; is the run still the same?

    sudo .venv/bin/python scripts/rehearse_nodes.py [--event cut|kill] [--node 0|1] [...]

Two network namespaces stand for the nodes, one process on each, started by
scripts/launch_torchrun.sh as on a cluster; they share a run folder, as on a cluster. A first run is
left alone. In the second, in the middle of a stage, either the link of one node is cut until the
other has noticed (`cut`), or everything on it is killed with SIGKILL and its launcher started again
(`kill`). A launcher that ends with an error is started again, as a scheduler would. Node 0 keeps
the store in which the launchers meet.

Then every step's loss and gradient norm, the weights and the outcomes of both runs must be the same
bit for bit. Exit code 0: they are; 1: they are not, or the run was not finished.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from two_nodes import ADDRESSES, INTERFACE, TwoNodes, two_nodes

ROOT = Path(__file__).resolve().parent.parent
PORT = 29400
NOTICED = "failed (exitcode"  # torchrun's launcher, of a trainer
LOST_STORE = "RendezvousConnectionError"  # the launcher itself
POLL_S = 0.02
COMPARED = ("loss", "gradient_norm")  # of a step


@dataclass(frozen=True)
class Plan:
    """What happens to the second run.

    Args:
        at: STAGE/STEP that has been taken when it happens.
        away_s: seconds until the link is up, or the launcher started, again; at least until the
            other node's launcher has noticed.
        timeout_s: the recipe's `strategy.timeout_s`.
        outage_s: OUTAGE of scripts/launch_torchrun.sh.
    """

    event: str = "cut"
    node: int = 1
    at: str = "joint/8"
    away_s: float = 0.0
    recipe: str = "train/pico.yaml"
    strategy: str = "ddp"
    timeout_s: float = 10.0
    outage_s: int = 120
    limit_s: float = 600.0
    settings: tuple[str, ...] = ()  # more of `dvpa train --set`


@dataclass
class Finished:
    """A run that came to its end, and how: seconds count from the event."""

    seconds: float  # all of it
    steps: dict[tuple[str, int], tuple[str, ...]]  # (stage, step) -> COMPARED, as it was taken last
    files: dict[str, str]  # SHA-256 of the weights, the tier map, the outcomes
    noticed: dict[int, float] = field(default_factory=dict)  # by a node's launcher
    resumed: list[tuple[float, str, int]] = field(default_factory=list)  # when, stage, step
    relaunched: list[tuple[float, int]] = field(default_factory=list)  # when, node
    back: float | None = None  # link up, or launcher started


def run(nodes: TwoNodes, plan: Plan, folder: Path, eventful: bool) -> Finished:
    """One run of the recipe into `folder`/run, on both nodes.

    Raises:
        TimeoutError: it has not come to an end after `plan.limit_s`.
        RuntimeError: a launcher gave up before anything happened, or too often after it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    nodes.lines.clear()
    for node in (0, 1):  # as an earlier run that failed may have left them
        nodes.kill(node)
        nodes.join(node)
    for node in (0, 1):
        launch(nodes, node, plan, folder)
    happened: float | None = None
    back: float | None = None
    relaunched: list[tuple[float, int]] = []
    while True:
        now = time.monotonic()
        if now - began > plan.limit_s:
            raise TimeoutError(f"{folder}: not finished after {plan.limit_s:.0f} s; see its logs")
        if eventful and happened is None and is_taken(folder / "run", plan.at):
            happened = now
            nodes.cut(plan.node) if plan.event == "cut" else nodes.kill(plan.node)
        if happened is not None and back is None:
            noticed = 1 - plan.node in noticing(nodes, happened)
            if noticed and now - happened >= plan.away_s:
                back = now - happened
                if plan.event == "cut":
                    nodes.join(plan.node)
        codes = [nodes.exit_code(node) for node in (0, 1)]
        if codes == [0, 0]:
            break
        for node, code in enumerate(codes):
            if not code or (happened is not None and back is None and node == plan.node):
                continue
            if happened is None or len(relaunched) >= 6:
                raise RuntimeError(f"node {node}: exit code {code}; see {folder}/node{node}.log")
            relaunched.append((now - happened, node))
            launch(nodes, node, plan, folder)
        time.sleep(POLL_S)
    if eventful and happened is None:
        raise RuntimeError(f"{folder}: the run was over before {plan.at} was seen")
    files = hashes(folder / "run")
    found = Finished(time.monotonic() - began, logged(folder / "run"), files)
    if happened is not None:
        found.relaunched, found.back = relaunched, back
        found.noticed = noticing(nodes, happened)
        for line in nodes.lines:
            stage, is_resumed, step = line.text.partition(" resumed from step ")
            if is_resumed:
                found.resumed.append((line.time - happened, stage.strip(), int(step)))
    return found


def noticing(nodes: TwoNodes, happened: float) -> dict[int, float]:
    """By node: when its launcher first told of a lost trainer, or of the lost store."""
    found: dict[int, float] = {}
    for line in list(nodes.lines):
        if line.time > happened and (NOTICED in line.text or LOST_STORE in line.text):
            found.setdefault(line.node, line.time - happened)
    return found


def launch(nodes: TwoNodes, node: int, plan: Plan, folder: Path) -> None:
    """Start scripts/launch_torchrun.sh on a node."""
    roots = [str(ROOT), str(ROOT / "train"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "NODES": "2",
        "RANKS": "1",
        "ENDPOINT": f"{ADDRESSES[0]}:{PORT}",
        "ADDRESS": ADDRESSES[node],
        "OUTAGE": str(plan.outage_s),
        "RESTARTS": "3",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    settings = {
        "strategy.kind": plan.strategy,
        "strategy.timeout_s": plan.timeout_s,
        "log_every": 1,
        "threads": 1,
    }
    command = ["bash", str(ROOT / "scripts" / "launch_torchrun.sh"), plan.recipe]
    command += ["--out", str(folder / "run")]
    for setting in [f"{name}={value}" for name, value in settings.items()] + [*plan.settings]:
        command += ["--set", setting]
    nodes.start(node, command, environment, folder / f"node{node}.log")


def logged(run_folder: Path) -> dict[tuple[str, int], tuple[str, ...]]:
    """Every step that the run's log tells of; one that was taken twice, as it was taken last."""
    path = run_folder / "logs" / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(name) for name in COMPARED)]
    return {
        (row["stage_name"], int(row["step"])): tuple(row[name] for name in COMPARED) for row in rows
    }


def is_taken(run_folder: Path, at: str) -> bool:
    """Whether the logs tell of that step (STAGE/STEP, counted from 1 in its stage), or a later."""
    stage, _, step = at.partition("/")
    in_stage = [number for name, number in logged(run_folder) if name == stage]
    return len(in_stage) >= int(step)


def hashes(run_folder: Path) -> dict[str, str]:
    """SHA-256 of what the run made of its training: weights, tier map, outcomes of every task."""
    names = ("checkpoint/*.safetensors", "checkpoint/tier_map.json", "outcomes/*.jsonl")
    return {
        str(path.relative_to(run_folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for path in sorted(run_folder.glob(name))
    }


def differences(reference: Finished, found: Finished) -> list[str]:
    """What is not the same; empty: nothing."""
    unlike = [
        f"{stage} step {step}: {', '.join(map(str, found.steps.get((stage, step), ['missing'])))}, "
        f"not {', '.join(values)}"
        for (stage, step), values in reference.steps.items()
        if found.steps.get((stage, step)) != values
    ]
    names = reference.files.keys() | found.files.keys()
    unlike += [name for name in sorted(names) if reference.files.get(name) != found.files.get(name)]
    return unlike


def report(plan: Plan, reference: Finished, found: Finished) -> str:
    """A few plain lines."""
    what, again = ("link cut", "link up again") if plan.event == "cut" else ("killed", "is back")
    lines = [
        f"node {plan.node} {what} at {plan.at}, {plan.strategy}, timeout_s {plan.timeout_s:g}",
        *(f"{s:7.1f} s  node {n} noticed" for n, s in sorted(found.noticed.items())),
        *([f"{found.back:7.1f} s  node {plan.node} {again}"] if found.back is not None else []),
        *(f"{s:7.1f} s  node {n}'s launcher started again" for s, n in found.relaunched),
        *(f"{s:7.1f} s  {stage} resumed from step {step}" for s, stage, step in found.resumed),
        *([] if found.resumed else ["no checkpoint of the stage was whole: it began again"]),
        f"finished after {found.seconds:.1f} s, "
        f"{found.seconds - reference.seconds:.1f} s more than the run that was left alone",
        f"{len(reference.steps)} steps and {len(reference.files)} files compared",
    ]
    unlike = differences(reference, found)
    lines += [f"NOT EQUAL: {line}" for line in unlike] or ["equal bit for bit"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse one event."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--event", choices=["cut", "kill"], default=plan.event)
    parser.add_argument("--node", type=int, choices=[0, 1], default=plan.node)
    parser.add_argument("--at", default=plan.at, metavar="STAGE/STEP")
    parser.add_argument("--away", type=float, default=plan.away_s, metavar="SECONDS")
    parser.add_argument("--recipe", default=plan.recipe)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default=plan.strategy)
    parser.add_argument("--timeout", type=float, default=plan.timeout_s, metavar="SECONDS")
    parser.add_argument("--outage", type=int, default=plan.outage_s, metavar="SECONDS")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/rehearse_nodes"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    plan = Plan(
        given.event, given.node, given.at, given.away, given.recipe, given.strategy,
        given.timeout, given.outage, settings=tuple(given.set),
    )  # fmt: skip
    try:
        with two_nodes() as nodes:
            print(f"the run that is left alone: {given.out / 'reference'}", flush=True)
            reference = run(nodes, plan, given.out / "reference", eventful=False)
            print(f"{reference.seconds:.1f} s; now with the event: {given.out / plan.event}")
            found = run(nodes, plan, given.out / plan.event, eventful=True)
    except PermissionError as error:
        print(f"rehearse_nodes: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rehearse_nodes: interrupted; both nodes are removed", file=sys.stderr)
        return 130
    except (TimeoutError, RuntimeError) as error:
        print(f"rehearse_nodes: {error}", file=sys.stderr)
        return 1
    print(report(plan, reference, found))
    if given.json is not None:
        content = {"plan": asdict(plan), "differences": differences(reference, found)}
        for name, one in (("reference", reference), ("found", found)):
            content[name] = {k: v for k, v in vars(one).items() if k not in ("steps", "files")}
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if differences(reference, found) else 0


if __name__ == "__main__":
    sys.exit(main())
