"""`dvpa calibrate` end to end on a small model, and one clear line for every bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcome_world import sum_model, sum_tokenizer
from test_cli import fails

from dvpa.cli import main
from dvpa.config import load_model_config
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.server.reports import find_report
from dvpa.tiers.tier_map import TierMap

ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(20) for b in range(8)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that does some sums."""
    folder = tmp_path_factory.mktemp("sums") / "checkpoint"
    sum_model().save_pretrained(folder)
    sum_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy whose tier map may be replaced."""
    return shutil.copytree(original, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def finished(original: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated copy."""
    folder = shutil.copytree(original, tmp_path_factory.mktemp("done") / "checkpoint")
    assert main(["calibrate", str(folder), "--tasks", str(tasks), "--budget", "90%"]) == 0
    return folder


def test_it_leaves_a_map_a_report_and_the_outcomes(finished: Path) -> None:
    tier_map = TierMap.load(finished / "tier_map.json")
    assert tier_map.is_fitted and tier_map.kind == "gain"
    assert tier_map.budget == {"fraction": 0.9}
    folder = finished / "calibration"
    report = json.loads((folder / "report.json").read_text())
    assert report["calibration"]["budget"]["stated"] == {"fraction": 0.9}
    assert {"adaptive", "random", "length", "tfidf", "cascade"} <= set(report["routers"])
    assert (folder / "report.html").stat().st_size > 10_000
    table = OutcomeTable.load(folder / "outcomes.jsonl")
    assert len(table) == len(ROWS)
    assert 0.02 < table.quality.mean() < 0.98
    assert np.isfinite(table.nll).all() and np.isfinite(table.flops).all()
    assert find_report(finished, None) == folder / "report.json"
    model = DvpaForCausalLM.from_pretrained(finished)
    assert model.tier_map == tier_map  # what serves it from now on


def test_the_lines_say_what_was_asked_for_and_what_came(
    finished: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again: nothing is generated twice, a threshold map in its place."""
    argv = ["calibrate", str(finished), "--tasks", str(tasks), "--kind", "threshold"]
    assert main([*argv, "--budget", "95%", "--alpha", "0.5"]) == 0
    printed = capsys.readouterr().out
    for head in (
        "budget",
        "quality",
        "tiers",
        "stay low",
        "head",
        "outcomes",
        "tier map",
        "report",
    ):
        assert f"\n{head}" in "\n" + printed
    assert "95% = " in printed and "(alpha 0.5, delta 0.1)" in printed
    assert TierMap.load(finished / "tier_map.json").kind == "threshold"


def test_json_alone_on_stdout(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcomes = finished / "calibration" / "outcomes.jsonl"
    argv = ["calibrate", str(finished), "--outcomes", str(outcomes), "--min-quality", "0.8"]
    argv += ["--tier-map", str(tmp_path / "map.json"), "--out", str(tmp_path / "report")]
    before = (finished / "tier_map.json").read_bytes()
    assert main([*argv, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tier_map"] == json.loads((tmp_path / "map.json").read_text())
    assert printed["calibration"]["budget"]["stated"] == {"min_quality": 0.8}
    assert "tfidf" not in printed["routers"]  # a table holds no questions
    assert (finished / "tier_map.json").read_bytes() == before
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("budget", ["25 ms", "3 MFLOPs", "quality>=0.8"])
def test_other_units(finished: Path, tmp_path: Path, budget: str) -> None:
    """Whether a budget can be kept depends on the machine for milliseconds, so ask for plenty."""
    outcomes = finished / "calibration" / "outcomes.jsonl"
    table = OutcomeTable.load(outcomes)
    given = budget
    if budget == "25 ms":
        table = OutcomeTable(**{**vars(table), "ms": table.tokens * np.array([1.0, 1.5, 2.0])})
        given = f"{table.ms[:, 1].mean():.3f} ms"
    if budget == "3 MFLOPs":
        given = f"{table.flops[:, 1].mean():.0f} FLOPs"
    table.save_jsonl(tmp_path / "o.jsonl")
    argv = ["calibrate", str(finished), "--outcomes", str(tmp_path / "o.jsonl"), "--budget", given]
    assert main([*argv, "--tier-map", str(tmp_path / "m.json"), "--out", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    unit = {"25 ms": "ms", "3 MFLOPs": "flops"}.get(budget, "activated_params")
    assert report["calibration"]["budget"]["unit"] == unit


def test_outcomes_of_another_model_are_refused(
    checkpoint: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", checkpoint, "--budget", "90%", "--outcomes"]
    outcomes = finished / "calibration" / "outcomes.jsonl"
    lines = outcomes.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    wide = ("quality", "nll", "completion_tokens", "activated_params", "flops", "ms")

    def written(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    two = [{**row, **{name: row[name][:2] for name in wide}} for row in rows]
    assert "2 tiers, the checkpoint has 3" in fails(capsys, *argv, written("two.jsonl", two))
    torn = [*rows[:3], two[3], *rows[4:]]
    assert "a tier is missing" in fails(capsys, *argv, written("torn.jsonl", torn))
    assert "no rows" in fails(capsys, *argv, written("empty.jsonl", []))
    assert "too few; at least 30" in fails(capsys, *argv, written("few.jsonl", rows[:50]))
    assert "nowhere" in fails(capsys, *argv, tmp_path / "nowhere.jsonl")
    assert not (checkpoint / "calibration").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget", "5%"], "the base tier, base, costs"),
        (["--budget", "100"], "the base tier, base, costs"),
        (["--budget", "cheap"], "'cheap' is not like"),
        (["--budget", "120%"], "outside (0, 1]"),
        ([], "give one of --budget, --min-quality"),
        (["--budget", "90%", "--min-quality", "0.9"], "give one of --budget, --min-quality"),
        (["--min-quality", "2"], "min_quality 2.0 is outside"),
        (["--budget", "90%", "--alpha", "1.5"], "--alpha: 1.5"),
        (["--budget", "90%", "--delta", "0"], "--delta: 0.0"),
        (["--budget", "90%", "--upper-cut"], "--upper-cut: needs --kind threshold"),
        (["--budget", "90%", "--items", "0"], "--items: 0"),
        (["--budget", "90%", "--last", "5"], "--last: needs --on-logs"),
        (["--budget", "90%", "--by-nll"], "--by-nll: needs --on-logs"),
        (["--budget", "90%", "--outcomes", "o.jsonl"], "give one of --tasks, --outcomes"),
        (["--budget", "90%", "--max-new-tokens", "300"], "fits the context"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options(
    checkpoint: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    named: str,
) -> None:
    assert named in fails(capsys, "calibrate", checkpoint, "--tasks", tasks, *options)
    assert TierMap.load(checkpoint / "tier_map.json").is_fitted is False


def test_bad_sources(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["calibrate", checkpoint, "--budget", "90%"]
    assert "give one of --tasks" in fails(capsys, *argv)
    assert "nowhere" in fails(capsys, *argv, "--tasks", "nowhere.jsonl")
    assert "nowhere" in fails(capsys, *argv, "--on-logs", tmp_path / "nowhere.log")
    assert "nowhere" in fails(capsys, "calibrate", "nowhere", "--budget", "1", "--tasks", "x")
    empty = tmp_path / "empty.log"
    empty.write_text("")
    assert "no request that the policy routed" in fails(capsys, *argv, "--on-logs", empty)


def test_a_checkpoint_without_a_head_is_refused_before_anything_runs(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_model_config("model/pico.yaml")
    config.difficulty = None
    folder = tmp_path / "headless"
    DvpaForCausalLM(config).save_pretrained(folder)
    argv = ("calibrate", folder, "--budget", "90%", "--tasks", tasks)
    assert "has no difficulty head" in fails(capsys, *argv)


def test_other_tasks_into_the_same_folder_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1][:70]))
    argv = ("calibrate", finished, "--budget", "90%", "--tasks", other)
    assert "holds a run with other" in fails(capsys, *argv)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("calibrate", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"example: dvpa {command} " in capsys.readouterr().out
