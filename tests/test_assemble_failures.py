"""Bad input and full disks while assembling: one clear error, and nothing half-written left."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assembly_world import (
    GATE,
    MIX,
    command,
    copied_world,
    edit,
    load,
    same,
    save,
    save_parents,
    weights,
    write_recipe,
)
from torch import Tensor

from dvpa.checkpoint.assemble import assemble
from dvpa.checkpoint.index_stream import INDEX_FILE
from dvpa.cli import main

MATRIX = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
SCALE = f"{MATRIX}_scale_inv"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_parents(tmp_path_factory.mktemp("pristine"), "ab", fp8=True)


@pytest.fixture
def world(pristine: dict[str, Path], tmp_path: Path) -> Path:
    """Parents a and b that may be damaged, and a recipe."""
    return copied_world(pristine, tmp_path)


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX_FILE).read_text())
    return folder / str(index["weight_map"][name])


def change_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        change(index["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return damage


def change_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit(folder, lambda t: t.update({name: change(t[name])}) if name in t else None)

    return damage


def drop(folder: Path) -> None:
    """A tensor gone from its shard and from the index."""
    edit(folder, lambda tensors: tensors.pop(GATE, None))
    change_index(lambda names: names.pop(GATE))(folder)


def add(folder: Path) -> None:
    def extend(tensors: dict[str, Tensor]) -> None:
        if GATE in tensors:
            tensors["model.extra"] = torch.ones(3)

    file = shard_of(folder, GATE).name
    edit(folder, extend)
    change_index(lambda names: names.update({"model.extra": file}))(folder)


def drop_weight(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(MATRIX, None))
    change_index(lambda names: names.pop(MATRIX))(folder)


def truncate(folder: Path) -> None:
    path = shard_of(folder, GATE)
    path.write_bytes(path.read_bytes()[:-10])


def set_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def wide(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]).contiguous()


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[2, 2] = float("nan")
    return tensor


def nan_code(tensor: Tensor) -> Tensor:
    raw = tensor.clone().view(torch.uint8)
    raw[300, 7] = 0x7F
    return raw.view(torch.float8_e4m3fn)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("b", truncate, r"model-\d+-of-000004.safetensors: \d+ bytes of data where"),
    "missing shard": ("b", lambda f: shard_of(f, GATE).unlink(), "no such shard"),
    "not in the index": ("a", change_index(lambda m: m.pop(GATE)), f"{GATE}: in model-.*, but not"),
    "not in the shard": (
        "b",
        change_index(lambda m: m.update({GATE: m[MATRIX]})),
        f"{GATE}: not in model-",
    ),
    "missing": ("b", drop, f"/b: {GATE}: missing, .*/a has it"),
    "unaccounted for": ("b", add, "/b: model.extra: unaccounted for, not in .*/a"),
    "shape": ("b", change_tensor(GATE, wide), rf"/b: {GATE}: BF16 \[8, 256\], .* \[4, 256\]"),
    "dtype": ("b", change_tensor(GATE, Tensor.float), f"/b: {GATE}: F32"),
    "scale alone": ("ab", drop_weight, f"{SCALE}: a scale without its weight"),
    "scale shape": (
        "ab",
        change_tensor(SCALE, lambda t: t[:4].contiguous()),
        rf"{SCALE}: F32 \[4, 2\] does not belong to F8_E4M3 \[576, 256\]",
    ),
    "nan": ("b", change_tensor(GATE, with_nan), f"/b: {GATE}: not finite"),
    "nan in the base": ("a", change_tensor(GATE, with_nan), f"/a: {GATE}: not finite"),
    "nan code": ("b", change_tensor(MATRIX, nan_code), f"/b: {MATRIX}: not finite"),
    "no config": ("b", lambda f: (f / "config.json").unlink(), "b/config.json: no such"),
    "bad config": ("b", lambda f: (f / "config.json").write_text("{") and None, "not valid JSON"),
    "model type": ("b", set_config(model_type="mixtral"), "model_type: parents differ: a: deep"),
    "layers": ("a", set_config(num_hidden_layers="3"), "num_hidden_layers: '3' must be positive"),
    "blocks": (
        "a",
        set_config(quantization_config={"weight_block_size": [64, 64]}),
        r"weight_block_size: \[64, 64\] must be",
    ),
    "absent": ("b", shutil.rmtree, "b/config.json: no such checkpoint"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_named_and_nothing_is_left(
    kind: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, damage, message = DAMAGE[kind]
    for name in folders:
        damage(world / name)
    before = {path.name for path in world.iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        assemble(world / "r.yaml", world / "out")
    assert main(["assemble", str(world / "r.yaml"), str(world / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
    assert len(error) == 1
    assert error[0].startswith("dvpa: error: ")
    left = {path.name for path in world.iterdir()} - before
    assert left <= ({"out.incomplete"} if "nan" in kind else set())
    if left:  # finished shards wait for the next run
        assert not (world / "out.incomplete" / "config.json").exists()
        assert not list((world / "out.incomplete").glob("*.partial"))


def test_fp8_without_scales_can_only_be_copied(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        tensors = weights(i, fp8=True)
        save(tmp_path / name, {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")})
    parents = {n: tmp_path / n for n in "ab"}
    with pytest.raises(ValueError, match=r"_proj.*weight: has no scales, which cannot be"):
        assemble(write_recipe(tmp_path / "r.yaml", parents, [MIX]), tmp_path / "out")
    rules = [{"match": "all", "lambda": {"b": 1.0}}]
    assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    result, right = load(tmp_path / "out"), load(tmp_path / "b")
    assert all(same(result[name], right[name]) for name in right)


@pytest.mark.parametrize("kind", ["full", "foreign", "file"])
def test_what_is_in_the_way_is_left_alone(kind: str, world: Path) -> None:
    place = world / ("out.incomplete" if kind == "foreign" else "out")
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty|in the way"):
        assemble(world / "r.yaml", world / "out")
    assert (place if kind == "file" else place / "config.json").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MB; a result has 3.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    world: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["assemble", str(world / "r.yaml"), str(small_disk / "out")]
    assert main(command) == 2
    assert "GB are still to be written, 0.001 GB are free" in capsys.readouterr().err
    # Somebody else takes the room meanwhile: found out while writing.
    monkeypatch.setattr("dvpa.checkpoint.assemble.check_room", lambda *_: None)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "no space left on device" in error
    assert "model." in error.split(": ")[-2]  # the tensor's name
    assert not (small_disk / "out").exists()
    assert not list(small_disk.rglob("config.json"))


def test_a_limit_on_the_size_of_files(world: Path, tmp_path: Path) -> None:
    """A disk that refuses in the middle of a tensor, without the right to mount one."""
    code = f"from dvpa.cli import main; raise SystemExit(main({command(world)[3:]!r}))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "file too large" in done.stderr
    assert not (world / "out").exists()
