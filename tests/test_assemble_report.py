"""What `dvpa assemble` says of its work: page, JSON, CSV, model card, the command's own words."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from assembly_world import (
    ALL,
    MIX,
    load,
    same,
    save,
    save_parents,
    weights,
    write_recipe,
)

from dvpa.checkpoint.assemble import assemble, survey
from dvpa.checkpoint.assembly_figure import histogram_svg
from dvpa.cli import main


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three bf16 parents; never written to."""
    return save_parents(tmp_path_factory.mktemp("parents"), "abc")


@pytest.fixture(scope="module")
def fp8_parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_parents(tmp_path_factory.mktemp("fp8_parents"), "ab", fp8=True)


def test_comparing_only_for_the_report_can_be_left_out(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    rules = [{"match": "routed_experts", "lambda": {"b": 1.0}}, ALL]
    recipe = write_recipe(tmp_path / "r.yaml", parents, rules)
    full = assemble(recipe, tmp_path / "full")
    lean = assemble(recipe, tmp_path / "lean", compare=False)
    left, right = load(tmp_path / "full"), load(tmp_path / "lean")
    assert all(same(left[name], right[name]) for name in left)
    assert (full.actions, lean.histogram["classes"]) == (lean.actions, {})
    experts = {row.name: row for row in full.classes}["routed_experts"]
    assert full.bytes_read - lean.bytes_read == experts.num_bytes
    assert "Nothing was compared" in (tmp_path / "lean" / "assembly.html").read_text()


def test_the_reports_agree(fp8_parents: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"match": "routed_experts", "lambda": {"a": 0.5, "b": 0.5}}, ALL]
    report = assemble(write_recipe(tmp_path / "r.yaml", fp8_parents, rules), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "assembly.json").read_text())
    assert {key: data[key] for key in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
    tensors = load(tmp_path / "out")
    with (tmp_path / "out" / "assembly_tensors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["tensor"] for row in rows} == tensors.keys()
    assert len(rows) == data["tensors"] == sum(row["tensors"] for row in data["classes"])
    for kind in data["classes"]:
        for action, count in kind["actions"].items():
            matching = [r for r in rows if (r["class"], r["action"]) == (kind["name"], action)]
            assert len(matching) == count
    counted = sum(sum(c) for by in data["histogram"]["classes"].values() for c in by.values())
    assert counted == 24  # of a weight and its scale, once
    page = (tmp_path / "out" / "assembly.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == ["a", "b"]
    assert "assembly.svg" in card
    assert (tmp_path / "out" / "assembly.svg").read_text() in page


def test_the_card_keeps_the_bases_licence_and_nothing_can_break_it(tmp_path: Path) -> None:
    parents = {n: save(tmp_path / n, weights(i)) for i, n in enumerate("ab")}
    (parents["a"] / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A\n")
    (parents["a"] / "LICENSE").write_text("MIT")
    (parents["a"] / "figures").mkdir()
    rules = [{"match": "all", "regex": r"a|<b>", "lambda": {"a": 0.5, "b": 0.5}}, ALL]
    assemble(write_recipe(tmp_path / "<r>.yaml", parents, rules), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert r"regex a\|<b>" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    page = (tmp_path / "out" / "assembly.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<r>" not in page
    assert "figures" in page


def test_differing_configs_and_idle_rules_are_reported(tmp_path: Path) -> None:
    parents = {
        "a": save(tmp_path / "a", weights(0), routed_scaling_factor=2.5),
        "b": save(tmp_path / "b", weights(1), routed_scaling_factor=1.0),
    }
    rules = [{"match": "attention", "layers": "90-99", "lambda": {"b": 1.0}}, MIX]
    report = survey(write_recipe(tmp_path / "r.yaml", parents, rules))
    assert report.warnings == [
        "rules[0] (attention, layers 90-99) matches no tensor",
        "config.json: routed_scaling_factor differs (a: 2.5, b: 1.0); a's is kept",
    ]


def test_the_command(
    parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", {**parents, "b": Path("nowhere")}, [MIX])
    out = tmp_path / "out"
    assert main(["assemble", str(recipe), str(out), "--dry-run"]) == 2
    assert "nowhere" in capsys.readouterr().err
    placed = ["--parent", f"b={parents['b']}"]
    assert main(["assemble", str(recipe), str(out), *placed, "--dry-run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["actions"]["merged"] == 77
    assert not out.exists()
    assert main(["assemble", str(recipe), str(out), *placed, "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "routed_experts" in shown
    assert max(map(len, shown.splitlines()[:16])) <= 80
    assert main(["assemble", str(recipe), str(out), *placed]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    for bad in (["--parent", "b"], ["--parent", "z=x"], ["--threads", "0"], ["--threads", "x"]):
        assert main(["assemble", str(recipe), str(tmp_path / "new"), *bad]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("factor", [1.1, 2.0, 40.0, 1e6])
def test_whatever_the_span_the_figure_has_a_few_ticks(factor: float) -> None:
    low = 2.1e-3
    edges = [math.log10(low), math.log10(low * factor)]
    report = {
        "histogram": {"edges": edges, "classes": {"norms": {"merged": [3]}}},
        "classes": [{"name": "norms", "difference": {"median": low}}],
        "recipe": {"rules": [{"delta": 0.0}]},
    }
    labels = re.findall(r'text-anchor="middle" class="q">([0-9.e-]+)<', histogram_svg(report))
    assert 2 <= len(labels) <= 12
    assert all(low <= float(label) <= low * factor for label in labels)
