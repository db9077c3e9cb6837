"""`dvpa assemble` against the fp32 formula and safetensors' own reader; reports; the command."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from assembly_world import (
    ALL,
    MIX,
    edit,
    formula,
    load,
    same,
    save,
    save_parents,
    weights,
    write_recipe,
)
from torch import Tensor

from dvpa.checkpoint.assemble import assemble, survey
from dvpa.checkpoint.assembly_plan import plan_assembly
from dvpa.checkpoint.fp8 import dequantise
from dvpa.checkpoint.headers import raw_header
from dvpa.checkpoint.index_stream import INDEX_FILE
from dvpa.checkpoint.recipe import load_recipe
from dvpa.checkpoint.tensor_class import place_of

SCALE = "_scale_inv"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three bf16 parents; never written to."""
    return save_parents(tmp_path_factory.mktemp("parents"), "abc")


@pytest.fixture(scope="module")
def fp8_parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_parents(tmp_path_factory.mktemp("fp8_parents"), "ab", fp8=True)


def test_linear_is_the_formula_to_the_bit(parents: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"match": "all", "lambda": {"a": 0.25, "b": 0.45, "c": 0.3}}]
    report = assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    loaded = [load(folder) for folder in parents.values()]
    result = load(tmp_path / "out")
    assert result.keys() == loaded[0].keys()
    for name, tensor in result.items():
        wanted = formula([0.25, 0.45, 0.3], [each[name] for each in loaded])
        assert same(tensor, wanted), name
    assert report.tensors == report.actions["merged"] == len(result)


def test_layout_metadata_and_side_files_are_the_bases(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    assemble(write_recipe(tmp_path / "r.yaml", parents, [MIX]), tmp_path / "out")
    base, out = parents["a"], tmp_path / "out"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert raw_header(out / name) == raw_header(base / name)
        assert (out / name).stat().st_size == (base / name).stat().st_size
    for name in (INDEX_FILE, "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    manifest = json.loads((out / "manifest.json").read_text())
    written = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == written
    for name, said in manifest["files"].items():
        content = (out / name).read_bytes()
        assert said == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert not (tmp_path / "out.incomplete").exists()


def test_one_file_without_an_index(tmp_path: Path) -> None:
    parents = {n: save(tmp_path / n, weights(i), shards=1) for i, n in enumerate("ab")}
    assemble(write_recipe(tmp_path / "r.yaml", parents, [MIX]), tmp_path / "out")
    result, left, right = (load(folder) for folder in (tmp_path / "out", *parents.values()))
    assert all(same(result[n], formula([0.6, 0.4], [left[n], right[n]])) for n in left)


def test_parents_may_be_cut_into_shards_differently(tmp_path: Path) -> None:
    parents = {
        "a": save(tmp_path / "a", weights(0, fp8=True), shards=5),
        "b": save(tmp_path / "b", weights(1, fp8=True), shards=2),
    }
    rules = [{"match": "all", "lambda": {"b": 1.0}}]
    assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    result, right = load(tmp_path / "out"), load(parents["b"])
    assert all(same(result[name], right[name]) for name in right)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5


def test_neighbours_are_combined_together_where_they_are_neighbours_everywhere(
    tmp_path: Path,
) -> None:
    parents = {
        "a": save(tmp_path / "a", weights(0), shards=3),
        "b": save(tmp_path / "b", weights(1), shards=3),
        "c": save(tmp_path / "c", weights(2), shards=2),
    }
    left, right, other = (load(folder) for folder in parents.values())
    for names, partner in (("ab", right), ("ac", other)):
        folders = {name: parents[name] for name in names}
        rules = [{"match": "all", "lambda": {"a": 0.6, names[1]: 0.4}}]
        recipe = write_recipe(tmp_path / f"{names}.yaml", folders, rules)
        plan = plan_assembly(load_recipe(recipe))
        units = list(plan.steps.units())
        assert sorted(step.number for unit in units for step in unit) == list(range(77))
        assert (len(units) < 20) == (names == "ab")
        assemble(recipe, tmp_path / names)
        result = load(tmp_path / names)
        assert all(same(result[n], formula([0.6, 0.4], [left[n], partner[n]])) for n in left)


@pytest.mark.parametrize("taken", ["a", "b"])
def test_one_parent_alone_comes_back_byte_for_byte(
    taken: str, fp8_parents: dict[str, Path], tmp_path: Path
) -> None:
    """Dense first layer, 576-row matrix, scales in other shards, an MTP layer, an unknown name."""
    rules = [{"match": "all", "lambda": {taken: 1.0}}]
    report = assemble(write_recipe(tmp_path / "r.yaml", fp8_parents, rules), tmp_path / "out")
    result, source = load(tmp_path / "out"), load(fp8_parents[taken])
    assert result.keys() == source.keys()
    assert all(same(result[name], source[name]) for name in source)
    kinds = {row.name for row in report.classes}
    assert {"dense_mlp", "mtp", "other", "routed_experts"} <= kinds
    assert report.actions == {"merged": 0, "copied": len(source), "kept": 0, "equal": 0}
    assert "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv" in source
    if taken == "a":
        for path in fp8_parents["a"].glob("*.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_fp8_is_interpolated_in_fp32(fp8_parents: dict[str, Path], tmp_path: Path) -> None:
    """Within E4M3's own rounding of the exact interpolation."""
    rules = [{"match": "all", "lambda": {"a": 0.5, "b": 0.5}}]
    assemble(write_recipe(tmp_path / "r.yaml", fp8_parents, rules), tmp_path / "out")
    left, right = (load(folder) for folder in fp8_parents.values())
    result = load(tmp_path / "out")
    errors = []
    for name in (name for name in result if f"{name}{SCALE}" in result):
        exact = formula(
            [0.5, 0.5], [dequantise(each[name], each[name + SCALE]) for each in (left, right)]
        )
        assert result[name].dtype == torch.float8_e4m3fn
        found = dequantise(result[name], result[name + SCALE])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert len(errors) > 40
    assert max(errors) < 0.0275
    assert sum(errors) / len(errors) < 0.0264  # white noise, nothing cancels; see docs/benchmarks
    for name in (name for name in result if not name.endswith(SCALE)):
        if f"{name}{SCALE}" not in result:
            assert same(result[name], formula([0.5, 0.5], [left[name], right[name]])), name


def test_the_first_rule_that_matches_decides(parents: dict[str, Path], tmp_path: Path) -> None:
    rules = [
        {"match": "routed_experts", "layers": 2, "experts": "1-2", "lambda": {"c": 1.0}},
        {"match": "routed_experts", "regex": r"down_proj", "lambda": {"a": 0.5, "b": 0.5}},
        {"match": "routed_experts", "lambda": {"b": 1.0}},
        {"match": "mtp", "lambda": {"b": 1.0}},
        {"match": "norms", "lambda": {"a": 0.5, "c": 0.5}},
        ALL,
    ]
    report = assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    a, b, c = (load(folder) for folder in parents.values())
    result = load(tmp_path / "out")
    for name, tensor in result.items():
        place = place_of(name, 3)
        if place.tensor_class == "routed_experts":
            if place.layer == 2 and place.expert in (1, 2):
                wanted = c[name]
            elif "down_proj" in name:
                wanted = formula([0.5, 0.5], [a[name], b[name]])
            else:
                wanted = b[name]
        elif place.tensor_class == "mtp":
            wanted = b[name]
        elif place.tensor_class == "norms":
            wanted = formula([0.5, 0.5], [a[name], c[name]])
        else:
            wanted = a[name]
        assert same(tensor, wanted), name
    assert [row.tensors for row in report.rules[:2]] == [6, 6]
    assert sum(row.tensors for row in report.rules) == len(result)


def near(tensors: dict[str, Tensor], level: float, names: Any, seed: int = 9) -> dict[str, Tensor]:
    """The same tensors, those that `names` picks moved by noise of that root mean square."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        noise = level * torch.randn(tensor.shape, generator=generator)
        moved[name] = (tensor.float() + noise).to(tensor.dtype) if names(name) else tensor
    return moved


def test_what_hardly_differs_stays_the_bases(tmp_path: Path) -> None:
    base = weights(0)
    other = near(near(base, 0.01, lambda n: ".experts." in n), 0.001, lambda n: "self_attn" in n)
    parents = {"a": save(tmp_path / "a", base), "b": save(tmp_path / "b", other)}
    recipe = write_recipe(tmp_path / "r.yaml", parents, [MIX], delta=0.003)
    report = assemble(recipe, tmp_path / "out")
    result = load(tmp_path / "out")
    for name, tensor in result.items():
        if ".experts." in name:
            assert same(tensor, formula([0.6, 0.4], [base[name], other[name]])), name
        else:
            assert same(tensor, base[name]), name
    rows = {row.name: row for row in report.classes}
    assert rows["routed_experts"].actions["merged"] == 24
    assert rows["attention"].actions["kept"] == 6  # and their norms are norms
    assert rows["embeddings"].actions["equal"] == 2
    assert rows["routed_experts"].difference is not None
    assert rows["routed_experts"].difference["median"] == pytest.approx(0.01, rel=0.02)
    assert rows["routed_experts"].relative == pytest.approx(0.5, rel=0.02)
    exact = [
        float((other[n].double() - base[n].double()).square().mean().sqrt())
        for n in base
        if ".experts." in n and "layers.3" not in n
    ]
    assert rows["routed_experts"].difference["max"] == pytest.approx(max(exact), rel=1e-4)


def test_a_rule_has_a_threshold_of_its_own(tmp_path: Path) -> None:
    base = weights(0)
    other = near(base, 0.005, lambda n: True)
    parents = {"a": save(tmp_path / "a", base), "b": save(tmp_path / "b", other)}
    rules = [
        {"match": "routed_experts", "experts": "0-1", "delta": 0.1, "lambda": {"b": 1.0}},
        {"match": "routed_experts", "delta": 0.001, "lambda": {"b": 1.0}},
        {"match": "all", "lambda": {"b": 1.0}},
    ]
    assemble(write_recipe(tmp_path / "r.yaml", parents, rules, delta=0.1), tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        place = place_of(name, 3)
        is_kept = place.tensor_class != "routed_experts" or place.expert in (0, 1)
        assert same(tensor, base[name] if is_kept else other[name]), name


def test_a_threshold_for_an_expert_as_a_whole(tmp_path: Path) -> None:
    """One matrix of expert 0 differs little, the expert does not: all of it is merged."""
    base = weights(0)
    other = near(base, 0.01, lambda n: ".experts.0." in n and "up_proj" not in n)
    other = near(other, 0.0005, lambda n: ".experts.0.up_proj" in n)
    other = near(other, 0.0005, lambda n: ".experts.1." in n)
    parents = {"a": save(tmp_path / "a", base), "b": save(tmp_path / "b", other)}
    rule = {"match": "routed_experts", "expert_delta": 0.003, "lambda": {"a": 0.5, "b": 0.5}}
    report = assemble(write_recipe(tmp_path / "r.yaml", parents, [rule, ALL]), tmp_path / "out")
    result = load(tmp_path / "out")
    for name, tensor in result.items():
        wanted = base[name]
        if ".experts.0." in name and "layers.3" not in name:
            wanted = formula([0.5, 0.5], [base[name], other[name]])
        assert same(tensor, wanted), name
    actions = {row.name: row.actions for row in report.classes}["routed_experts"]
    assert actions == {"merged": 6, "copied": 0, "kept": 6, "equal": 12}


def test_whatever_the_chunks_the_result_is_the_same(
    parents: dict[str, Path],
    fp8_parents: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind, folders in (("bf16", parents), ("fp8", fp8_parents)):
        recipe = write_recipe(tmp_path / f"{kind}.yaml", folders, [MIX], delta=1e-9)
        assemble(recipe, tmp_path / kind)
        with monkeypatch.context() as patch:
            for module in ("assembly_steps", "assembly_plan"):
                patch.setattr(f"dvpa.checkpoint.{module}.CHUNK_BYTES", 1000)
            assemble(recipe, tmp_path / f"{kind}_small", threads=3)
        left, right = load(tmp_path / kind), load(tmp_path / f"{kind}_small")
        assert all(same(left[name], right[name]) for name in left)


def test_tensors_that_are_no_floats_are_taken_whole(tmp_path: Path) -> None:
    extra = {"model.steps": torch.arange(6), "model.flags": torch.tensor([True, False])}
    parents = {
        "a": save(tmp_path / "a", {**weights(0), **extra}),
        "b": save(tmp_path / "b", {**weights(1), **extra, "model.steps": torch.arange(6) * 2}),
    }
    rules = [{"match": "other", "delta": 0.5, "lambda": {"b": 1.0}}, MIX]
    assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    result = load(tmp_path / "out")
    assert result["model.steps"].equal(torch.arange(6) * 2)
    assert result["model.flags"].equal(extra["model.flags"])
    with pytest.raises(ValueError, match=r"model.(steps|flags): is (I64|BOOL), which cannot be"):
        assemble(write_recipe(tmp_path / "r.yaml", parents, [MIX]), tmp_path / "mixed")


def test_a_dry_run_says_what_a_run_does(parents: dict[str, Path], tmp_path: Path) -> None:
    rules = [
        {"match": "routed_experts", "delta": 0.0283, "lambda": {"a": 0.5, "b": 0.5}},
        {"match": "attention", "lambda": {"b": 1.0}},
        MIX,
    ]
    recipe = write_recipe(tmp_path / "r.yaml", parents, rules)
    foretold = survey(recipe)
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml"}
    done = assemble(recipe, tmp_path / "out")
    assert foretold.actions == done.actions
    assert foretold.classes == done.classes
    assert foretold.histogram == done.histogram
    assert 0 < done.actions["kept"] < 24


def test_no_torch_without_fp8(parents: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", parents, [MIX])
    program = (
        "import sys; from dvpa.cli import main\n"
        f"code = main(['assemble', {str(recipe)!r}, {str(tmp_path / 'out')!r}])\n"
        "loaded = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "raise SystemExit(f'loaded: {sorted(loaded)}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchs_threads_are_left_as_they_were(fp8_parents: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        survey(write_recipe(tmp_path / "r.yaml", fp8_parents, [MIX]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_result_may_be_a_parent(parents: dict[str, Path], tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "1.yaml", {k: parents[k] for k in "ab"}, [MIX])
    assemble(first, tmp_path / "ab")
    folders = {"a": tmp_path / "ab", "b": parents["c"]}
    assemble(write_recipe(tmp_path / "2.yaml", folders, [MIX]), tmp_path / "out")
    result, left, right = (load(folder) for folder in (tmp_path / "out", *folders.values()))
    assert all(same(result[n], formula([0.6, 0.4], [left[n], right[n]])) for n in left)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "ab").iterdir()}


def test_editing_keeps_the_index(tmp_path: Path) -> None:
    """Guards the tests' own tool: nothing but the tensor changes."""
    folder = save(tmp_path / "a", weights(0))
    before = load(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2})
         if "lm_head.weight" in t else None)  # fmt: skip
    after = load(folder)
    assert [n for n in before if not same(before[n], after[n])] == ["lm_head.weight"]
