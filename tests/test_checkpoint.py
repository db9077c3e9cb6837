"""Safetensors shards: what is read, what is refused, and folders that are complete or absent."""

import itertools
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import YARN, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dvpa.checkpoint import ShardReader, ShardWriter, TensorInfo, staged_folder
from dvpa.checkpoint.pace import Pace
from dvpa.checkpoint.shards import DTYPES, INDEX_FILE, read_header, write_json
from dvpa.model.tensor_names import tensor_shapes

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.randn(2, 3, 2).to(torch.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> None:
    with ShardWriter(folder, plan_of(tensors), shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def test_one_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 6))
def test_shards_and_index(shard_bytes: int, count: int) -> None:
    import tempfile

    tensors = {f"t{i}": torch.randn(i + 1, 3) for i in range(count)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, tensors, shard_bytes)
        reader = ShardReader(folder)
        assert reader.tensors == plan_of(tensors)
        assert all(same(reader.read(name), tensors[name]) for name in tensors)
        if (folder / INDEX_FILE).exists():
            index = json.loads((folder / INDEX_FILE).read_text())
            assert index["weight_map"].keys() == tensors.keys()
            assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in tensors.values())
            assert set(index["weight_map"].values()) == {
                p.name for p in folder.glob("*.safetensors")
            }


def test_a_slice_is_read_alone(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.read("a", (slice(1, 3), slice(0, 2))), TENSORS["a"][1:3, :2])
    with pytest.raises(ValueError, match="zzz: no such tensor"):
        reader.read("zzz")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 12, "attention_bias": True},
        {"attention_bias": True, "n_shared_experts": 0},
        {"tie_word_embeddings": True, "difficulty": None},
        {"first_k_dense_replace": 0, "rope_parameters": YARN},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_a_saved_model(changes: dict, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    tiny_model(config).save_pretrained(tmp_path, max_shard_size="20KB")
    saved = ShardReader(tmp_path).tensors
    assert {name: info.shape for name, info in saved.items()} == tensor_shapes(config)
    assert {info.dtype for info in saved.values()} == {"F32"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def long_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"[" + data[9:])


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage that rewrites the header as JSON and keeps its length field right."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    return damage


DAMAGE = {
    "cut": (cut, "bytes of data where the header promises"),
    "grown": (grow, "bytes of data where the header promises"),
    "empty": (empty, "not a safetensors file"),
    "header length": (long_header, "not a safetensors file"),
    "no JSON": (no_json, "corrupt header"),
    "dtype": (edited(lambda h: h["a"].update(dtype="F7")), "a: unknown dtype F7"),
    "shape": (edited(lambda h: h["a"].update(shape=[3, 5])), "a: data offsets"),
    "negative": (edited(lambda h: h["a"].update(shape=[-3, -4])), "a: shape"),
    "offsets": (edited(lambda h: h["b"].update(data_offsets=[0, 10])), "data offsets"),
    "no shape": (edited(lambda h: h["a"].pop("shape")), "corrupt header"),
    "no entry": (edited(lambda h: h.update(a=3)), "corrupt header"),
    "list": (edited(lambda h: h["a"].update(shape="ab")), "corrupt header"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_shard_is_refused(kind: str, tmp_path: Path) -> None:
    write(tmp_path, {n: TENSORS[n] for n in "ab"})
    damage, message = DAMAGE[kind]
    path = tmp_path / "model.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=message) as failure:
        ShardReader(tmp_path)
    assert "model.safetensors" in str(failure.value)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such shard"):
        ShardReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=8)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("{}", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"zzz": "model.safetensors"}}', "zzz: not in model.safetensors"),
    ],
)
def test_a_bad_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(ValueError, match=message):
        ShardReader(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2), name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"a: also in one.safetensors"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(3, 4), "b: not due"),
        ("a", torch.zeros(4, 3), "a: .* was planned as F32"),
        ("a", torch.zeros(3, 4).half(), "a: torch.float16"),
    ],
)
def test_the_writer_keeps_to_its_plan(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        ShardWriter(tmp_path, plan_of(TENSORS)) as writer,
    ):
        writer.write(name, tensor)


def test_leaving_the_writer_early_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="b: planned but never written"),
        ShardWriter(tmp_path, plan_of(TENSORS)) as writer,
    ):
        writer.write("a", TENSORS["a"])


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    view = TENSORS["a"].T[1:]
    write(tmp_path, {"v": view})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["v"], view)


def test_staging_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_staging_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_staging_fills_an_empty_folder_but_never_a_full_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staged_folder(out) as folder:
        (folder / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"), staged_folder(out):
        raise AssertionError
    assert (out / "file").read_text() == "x"
    blocked = tmp_path / "a file"
    blocked.touch()
    with pytest.raises(ValueError, match="exists and is not empty"), staged_folder(blocked):
        raise AssertionError


def test_staging_never_removes_what_is_not_ours(tmp_path: Path) -> None:
    foreign = tmp_path / "out.incomplete"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="in the way"), staged_folder(tmp_path / "out"):
        raise AssertionError
    assert (foreign / "thesis.txt").exists()


def test_kill_minus_9_leaves_no_folder_and_the_next_run_completes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with staged_folder(out) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.incomplete" / "half").exists()
    with staged_folder(out) as folder:
        assert not (folder / "half").exists()
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert read_header(tmp_path / "model.safetensors") == plan_of(TENSORS)


def test_the_pace_of_a_long_copy_in_words() -> None:
    """A clock that jumps half a second at each look: 1 of 4 GB took that long, and so on."""
    seconds, said = itertools.count(0.0, 0.5), list[str]()
    pace = Pace(4 * 10**9, said.append, clock=lambda: next(seconds))
    for _ in range(4):
        pace.add(10**9)
    assert said[0] == "writing 1.00 of 4.00 GB, 2,000 MB/s, 0:00:02 left"
    assert said[-1] == "writing 4.00 of 4.00 GB, 2,000 MB/s, 0:00:00 left"
    said.clear()
    pace = Pace(10**9, said.append, clock=lambda: 7.0)  # no time has passed: nothing to say
    pace.add(10**9)
    assert said == []


def test_the_writer_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvpa.checkpoint.pace.INTERVAL_S", 0.0)
    said: list[str] = []
    with ShardWriter(tmp_path, plan_of(TENSORS), say=said.append) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert len(said) == len(TENSORS)
    assert all(text.startswith("writing 0.00 of 0.00 GB, ") for text in said)


@pytest.mark.parametrize("where", ["tensor", "side file"])
def test_a_full_disk_names_what_was_being_written(where: str, tmp_path: Path) -> None:
    """By a limit on the size of files, which Python reports as EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"model.large": torch.zeros(300_000), "model.small": torch.zeros(3)}
    expected = "model.safetensors: model.large" if where == "tensor" else "/out'"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match=expected), staged_folder(tmp_path / "out") as folder:
            if where == "tensor":
                write(folder, large)
            write_json(folder / "notes.json", {"notes": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
