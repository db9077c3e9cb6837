"""What a run logs: every name, the values against those computed, resumed runs, each logger."""

import json
import math
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_world import (
    FIRST_STEPS,
    HAS_TENSORBOARD,
    LOGGED,
    LOGGERS,
    NEEDS_TENSORBOARD,
    EndOfTraining,
    Interrupted,
    Seen,
    csv_rows,
    events,
    lasting,
    metrics,
    numbers,
    train,
    wandb_history,
    wandb_records,
    wandb_runs,
    watched,
)
from PIL import Image
from train_world import command, environment, two_experts
from train_world import train as train_apart

from dvpa.evaluate.table import OutcomeTable
from dvpa.pricing import price
from dvpa.tiers.calibrate import expected_calibration_error
from dvpa_train.interrupts import Stopped

TIERS = ("base", "middle", "top")
LAST = LOGGED[-1]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Seen]]:
    """A whole short run, and what it computed."""
    with watched(only_stages=False) as seen:
        yield train(tmp_path_factory.mktemp("logged") / "run"), seen


@pytest.fixture(scope="module")
def rows(logged: tuple[Any, Seen]) -> dict[int, dict[str, str]]:
    """The record, by step; the last is the calibration's."""
    found = metrics(logged[0].out)
    assert [int(row["step"]) for row in found] == [*LOGGED, LAST + 1]
    return {int(row["step"]): row for row in found}


def test_rows_hold_what_was_computed(logged: tuple[Any, Seen], rows: Any) -> None:
    trained, seen = logged
    before: dict[str, float] = {"tokens": 0, "training_flops": 0.0}
    for step in LOGGED:
        row, own = numbers(rows[step]), seen.steps[step]
        latest = own["latest"]
        assert row["loss"] == latest["loss"]
        for tier, name in enumerate(TIERS):
            assert row.get(f"loss/{name}") == latest.get(f"nll/tier_{tier}"), name
        assert row.get("kl") == latest.get("distillation")
        assert row["gradient_norm"] == latest["gradient_norm"]
        assert row["learning_rate"] == own["lr"]
        assert row["tokens"] == before["tokens"] + own["tokens"]
        assert row["training_flops"] == before["training_flops"] + own["flops"]
        assert rows[step]["stage_name"] == own["stage"]
        assert row["stage"] == list(FIRST_STEPS).index(own["stage"])
        if step + 1 in {first + 1 for first in FIRST_STEPS.values()}:
            before = {name: row[name] for name in before}
    assert (
        before["tokens"]
        < numbers(rows[LAST])["tokens"]
        == sum(stage.tokens for stage in trained.stages)
    )
    for name in TIERS:
        assert rows[LAST][f"loss/{name}"], name
    assert rows[LAST]["kl"]


def test_rates_follow_their_formulas(logged: tuple[Any, Seen], rows: Any) -> None:
    """Tokens, FLOPs and seconds since the row before, in the same stage."""
    trained, seen = logged
    activated = [tier.activated_params for tier in price(trained.model.config).tiers]
    for step in LOGGED:
        row, own = numbers(rows[step]), seen.steps[step]
        first = FIRST_STEPS[own["stage"]]
        previous = max([s for s in LOGGED if first < s < step], default=None)
        then = seen.steps[previous] if previous else {"tokens": 0, "seconds": 0.0, "flops": 0.0}
        tokens, seconds, flops = (own[n] - then[n] for n in ("tokens", "seconds", "flops"))
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert row["mfu"] == pytest.approx(flops / seconds / row["peak_flops"])
        assert 0 < row["mfu"] < 1
        # Six FLOPs per activated parameter and token, counted from the routing of the first layer.
        taken = [s for s in seen.steps if (previous or first) < s <= step]
        per_tier = Counter(
            tier for s in taken for tier in seen.steps[s]["routed"][0][1] if tier >= 0
        )
        assert flops == pytest.approx(sum(6 * n * activated[t] for t, n in per_tier.items()))
        assert row["memory/max_rss_bytes"] > 50e6


def naive_load(steps: list[dict[str, Any]]) -> Counter[tuple[int, int, int]]:
    """(MoE layer, tier, expert) -> rows, one after the other."""
    count: Counter[tuple[int, int, int]] = Counter()
    for step in steps:
        for layer, (slots, tiers) in enumerate(step["routed"]):
            for chosen, tier in zip(slots, tiers, strict=True):
                for expert in chosen:
                    if tier >= 0 and expert < step["experts"]:
                        count[layer, tier, expert] += 1
    return count


def test_balance_is_that_of_the_routing_records(logged: tuple[Any, Seen], rows: Any) -> None:
    trained, seen = logged
    config = trained.model.config
    for step in LOGGED:
        row = numbers(rows[step])
        load = naive_load([seen.steps[step]])
        for tier in {tier for _, tier, _ in load}:
            name, pool = TIERS[tier], range(config.pool_size(tier))
            layers = [[load[layer, tier, expert] for expert in pool] for layer in range(2)]
            violations = [max(own) / (sum(own) / len(own)) - 1 for own in layers]
            assert row[f"balance/max_violation/{name}"] == pytest.approx(sum(violations) / 2)
            worst = row[f"balance/max_violation_worst_layer/{name}"]
            assert worst == pytest.approx(max(violations))
            dead = sum(own.count(0) for own in layers)
            assert row[f"balance/dead_experts/{name}"] == dead
            shares, dead_inside = [], 0.0
            for group in range(len(pool) // config.group_size):
                place = slice(group * config.group_size, (group + 1) * config.group_size)
                inside = [own[place] for own in layers]
                parts = zip(inside, layers, strict=True)
                share = sum(sum(part) / sum(own) for part, own in parts) / 2
                shares.append(row[f"balance/load_share/{name}/group_{group}"])
                assert shares[-1] == pytest.approx(share)
                dead_inside += row[f"balance/dead_experts/{name}/group_{group}"]
                own = [max(part) / (sum(part) / len(part)) - 1 for part in inside if sum(part)]
                logged_violation = row.get(f"balance/max_violation/{name}/group_{group}")
                assert logged_violation == (pytest.approx(sum(own) / len(own)) if own else None)
            assert sum(shares) == pytest.approx(1)
            assert dead_inside == dead


def test_load_tables_hold_every_row_of_their_steps(logged: tuple[Any, Seen]) -> None:
    trained, seen = logged
    folder, config = trained.out / "logs" / "load", trained.model.config
    ends = {"foundation": 5, "grow": 9, "joint": 16}
    assert {path.stem for path in folder.iterdir()} == {f"step-{s:08}" for s in ends.values()}
    for stage, end in ends.items():
        steps = [own for own in seen.steps.values() if own["stage"] == stage]
        load = naive_load(steps)
        table = csv_rows(folder / f"step-{end:08}.csv")
        for line in table:
            tier, expert = TIERS.index(line["tier"]), int(line["expert"])
            assert int(line["rows"]) == load[int(line["layer"]) - 1, tier, expert]
            assert int(line["group"]) == expert // config.group_size
        assert sum(int(line["rows"]) for line in table) == sum(load.values())
        picture = np.asarray(Image.open(folder / f"step-{end:08}.png"))
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20


def test_calibration_is_that_of_the_test_outcomes(logged: tuple[Any, Seen], rows: Any) -> None:
    trained, _ = logged
    test = OutcomeTable.load_jsonl(trained.out / "outcomes" / "test.jsonl")
    success = trained.model.tier_map.success(test.difficulty)
    row = numbers(rows[LAST + 1])
    table = csv_rows(trained.out / "logs" / "calibration" / f"step-{LAST + 1:08}.csv")
    for tier, name in enumerate(TIERS):
        error = expected_calibration_error(success[:, tier], test.quality[:, tier])
        assert row[f"calibration/ece/{name}"] == pytest.approx(error)
        lines = [line for line in table if line["tier"] == name]
        assert sum(int(line["requests"]) for line in lines) == len(test)
        observed = sum(float(line["observed"]) * int(line["requests"]) for line in lines)
        assert observed / len(test) == pytest.approx(test.quality[:, tier].mean())


# -- each logger ----------------------------------------------------------------------------------


@NEEDS_TENSORBOARD
def test_tensorboard_reads_back_the_record(logged: tuple[Any, Seen], rows: Any) -> None:
    found = events(logged[0].out)
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, row in rows.items():
        for name, value in numbers(row).items():
            expected.setdefault(name, []).append((step, value))
    del expected["step"]
    assert set(found.Tags()["scalars"]) == set(expected)
    for name, series in expected.items():
        read = found.Scalars(name)
        assert [event.step for event in read] == [step for step, _ in series], name
        values = [value for _, value in series]
        assert [event.value for event in read] == pytest.approx(values, rel=1e-6), name
    assert [image.step for image in found.Images("load")] == [5, 9, 16]
    assert [image.step for image in found.Images("calibration")] == [LAST + 1]
    marks = found.Tensors("stage/text_summary")
    assert [mark.step for mark in marks] == [first + 1 for first in FIRST_STEPS.values()]
    text = marks[-1].tensor_proto.string_val[0].decode()
    assert text == "joint (joint): 3 tiers, 7 steps"


def test_wandb_reads_back_the_record(logged: tuple[Any, Seen], rows: Any) -> None:
    out = logged[0].out
    (folder,) = wandb_runs(out)
    history = wandb_history(folder)
    assert list(history) == [*LOGGED, LAST + 1]
    for step, row in rows.items():
        expected = numbers(row)
        del expected["step"]
        for name, value in expected.items():
            assert history[step][name] == pytest.approx(value, rel=1e-12), name
        assert history[step]["stage_name"] == row["stage_name"]
    pictures = {step for step, item in history.items() if item.get("load._type") == "image-file"}
    assert pictures == {5, 9, 16}
    assert history[LAST + 1]["calibration._type"] == "image-file"
    (run,) = (r["run"] for r in wandb_records(folder) if r["type"] == "run")
    assert run["run_id"] == json.loads((out / "logs" / "wandb.json").read_text())["id"]
    assert run["project"] == "dvpa"


def test_a_finished_run_that_is_run_again_logs_nothing_new(logged: tuple[Any, Seen]) -> None:
    out = logged[0].out
    before, starts = (out / "logs" / "metrics.csv").read_bytes(), len(wandb_runs(out))
    train(out)
    assert (out / "logs" / "metrics.csv").read_bytes() == before
    assert len(wandb_runs(out)) == starts


def test_logging_changes_no_bit_of_the_training(logged: tuple[Any, Seen], tmp_path: Path) -> None:
    with watched() as silent, pytest.raises(EndOfTraining):
        train(tmp_path / "run", "loggers=[]")
    assert not (tmp_path / "run" / "logs").exists()
    assert silent.steps.keys() == logged[1].steps.keys()
    for step, own in logged[1].steps.items():
        assert silent.steps[step]["latest"] == own["latest"], step


# -- resumed runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fail_at", pytest.param("stop_at", marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_one_unbroken_series(
    how: str, logged: tuple[Any, Seen], rows: Any, tmp_path: Path
) -> None:
    """At step 14: checkpoint and rows of the joint stage at 12 and at 11, 13; or both at 15."""
    out, error = tmp_path / "run", Interrupted if how == "fail_at" else Stopped
    with watched(**{how: 14}), pytest.raises(error):
        train(out)
    reached = 13 if how == "fail_at" else 15
    assert int(metrics(out)[-1]["step"]) == reached  # the step it was stopped after is logged
    if HAS_TENSORBOARD:
        assert [event.step for event in events(out).Scalars("loss")][-1] == reached
    with watched() as seen, pytest.raises(EndOfTraining):
        train(out)
    assert min(seen.steps) == (13 if how == "fail_at" else 16)
    found = metrics(out)
    expected = [rows[step] for step in LOGGED]
    assert [int(row["step"]) for row in found] == LOGGED
    for row, whole in zip(found, expected, strict=True):
        ours, theirs = lasting(row), lasting(whole)
        assert ours.items() <= theirs.items()
        assert not any(theirs[name] for name in theirs.keys() - ours.keys())  # calibration's
    for name in ("step-00000005.csv", "step-00000009.csv", "step-00000016.csv"):
        own, theirs = (path / "logs" / "load" / name for path in (out, logged[0].out))
        assert own.read_bytes() == theirs.read_bytes(), name

    if HAS_TENSORBOARD:
        for name in ("loss", "balance/max_violation/top"):
            read = [(event.step, event.value) for event in events(out).Scalars(name)]
            wanted = [(int(row["step"]), float(row[name])) for row in found if row[name]]
            assert [step for step, _ in read] == [step for step, _ in wanted]
            assert [v for _, v in read] == pytest.approx([v for _, v in wanted], rel=1e-6)
        assert len(events(out).Tensors("stage/text_summary")) == 3
        assert [image.step for image in events(out).Images("load")] == [5, 9, 16]

    first, second = wandb_runs(out)
    ids = [r["run"]["run_id"] for f in (first, second) for r in wandb_records(f) if "run" in r]
    assert len(set(ids)) == 1
    history = wandb_history(second)  # complete by itself
    assert list(history) == LOGGED
    for row in found:
        assert history[int(row["step"])]["loss"] == float(row["loss"])
    assert history[5]["load._type"] == "image-file"


@pytest.mark.slow
def test_a_refused_step_goes_back_without_a_gap(tmp_path: Path, logged: Any, rows: Any) -> None:
    """The guard's own way back, inside one process: checkpoint at 12, refused after row 15."""
    out = tmp_path / "run"
    with watched() as seen, pytest.MonkeyPatch.context() as patch:
        refuse_once(patch, at=15)
        with pytest.raises(EndOfTraining):
            train(out)
    assert max(seen.steps) == LAST
    found = metrics(out)
    assert [int(row["step"]) for row in found] == LOGGED
    for row in found[:-1]:  # the last step had another batch
        assert float(row["loss"]) == float(rows[int(row["step"])]["loss"])
    assert list(wandb_history(wandb_runs(out)[-1])) == LOGGED


def refuse_once(patch: pytest.MonkeyPatch, at: int) -> None:
    """Make the guard see NaN in the step after `at`."""
    from dvpa_train.guard import Guard

    check, done = Guard.check, []

    def refuse(guard: Guard, step: int, loss: float) -> None:
        if guard.recent and step == at - FIRST_STEPS["joint"] and not done:
            done.append(step)
            loss = math.nan
        check(guard, step, loss)

    patch.setattr(Guard, "check", refuse)


# -- killed, and several processes ----------------------------------------------------------------


LOG = (f"loggers=[{', '.join(LOGGERS)}]", "log_every=2", "checkpoint_every=3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pico at its full length in one process, with two experts a token."""
    folder = tmp_path_factory.mktemp("alone")
    return train_apart(folder / "run", 1, *LOG, two_experts(folder), WANDB_MODE="offline").out


@pytest.mark.slow
def test_kill_minus_nine_leaves_one_unbroken_series(alone: Path, tmp_path: Path) -> None:
    """Rows of the joint stage were logged at 20 and 22, its checkpoint is that of 21."""
    options = (*LOG, two_experts(tmp_path))
    out = tmp_path / "run"
    variables = environment(DVPA_TEST_KILL="0:joint/5", WANDB_MODE="offline")
    killed = subprocess.run(command(out, 1, *options), env=variables, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert int(metrics(out)[-1]["step"]) == 22
    train_apart(out, 1, *options, WANDB_MODE="offline")
    assert [lasting(row) for row in metrics(out)] == [lasting(row) for row in metrics(alone)]
    steps = [int(row["step"]) for row in metrics(out)]
    assert list(wandb_history(wandb_runs(out)[-1])) == steps
    if HAS_TENSORBOARD:
        assert [event.step for event in events(out).Scalars("loss")] == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param("kind=ddp", marks=pytest.mark.rehearsal),
        "kind=fsdp2 expert_parallel=2",
        pytest.param("kind=fsdp2 accumulate=2", marks=pytest.mark.rehearsal),
    ],
)
def test_two_processes_log_once_what_both_have_done(
    options: str, alone: Path, tmp_path: Path
) -> None:
    kind = [f"strategy.{option}" for option in options.split()]
    out = tmp_path / "run"
    train_apart(out, 2, *LOG, two_experts(tmp_path), *kind, WANDB_MODE="offline")
    found, expected = metrics(out), metrics(alone)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for own, theirs in zip(map(numbers, found), map(numbers, expected), strict=True):
        assert own.keys() == theirs.keys()
        for name in ("tokens", "training_flops"):
            assert own[name] == pytest.approx(theirs[name], rel=1e-12)
        for name in ("loss", "loss/base", "gradient_norm", "learning_rate"):
            assert own[name] == pytest.approx(theirs[name], rel=1e-4), name
    for path in sorted((alone / "logs" / "load").glob("*.csv")):
        own, theirs = csv_rows(out / "logs" / "load" / path.name), csv_rows(path)
        rows, wanted = ([int(line["rows"]) for line in table] for table in (own, theirs))
        assert sum(rows) == sum(wanted)
        assert rows == pytest.approx(wanted, abs=0.02 * max(wanted))  # a near tie may fall over
    assert len(wandb_runs(out)) == 1
    assert list(wandb_history(wandb_runs(out)[0])) == [int(row["step"]) for row in found]
    assert len(list((out / "logs").rglob("metrics.csv"))) == 1
    if HAS_TENSORBOARD:
        assert len(list((out / "logs" / "tensorboard").iterdir())) == 1
