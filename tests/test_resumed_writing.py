"""Checkpoints written in several goes: finished shards stay, everything else is made again."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dvpa.checkpoint import ShardReader, ShardWriter, TensorInfo
from dvpa.checkpoint.folders import PARTIAL
from dvpa.checkpoint.index_stream import INDEX_FILE

TENSORS = {f"layer.{i}": torch.full((i % 3 + 1, 4), float(i)) for i in range(9)}
PLAN = {name: TensorInfo("F32", tuple(value.shape)) for name, value in TENSORS.items()}


class Killed(Exception):
    pass


def write(folder: Path, shard_bytes: int, until: int = 99, resume: bool = True) -> int:
    """Write up to the tensor numbered `until`, then die; how many shards were there already."""
    with ShardWriter(folder, PLAN, shard_bytes, resume=resume) as writer:
        for i, (name, tensor) in enumerate(TENSORS.items()):
            if i == until:
                raise Killed
            if writer.is_due(name):
                writer.write(name, tensor)
    return writer.resumed


@settings(max_examples=40)
@given(st.sampled_from([1, 50, 100, 10_000]), st.lists(st.integers(0, 9), max_size=4))
def test_goes_of_any_length_end_as_one(
    tmp_path_factory: pytest.TempPathFactory, shard_bytes: int, ends: list[int]
) -> None:
    folder, whole = (tmp_path_factory.mktemp(name) for name in ("parts", "whole"))
    for end in ends:
        try:
            write(folder, shard_bytes, end)
        except Killed:
            assert not (folder / INDEX_FILE).exists()
            assert not list(folder.glob(f"*{PARTIAL}"))
    write(folder, shard_bytes)
    write(whole, shard_bytes, resume=False)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_shards_that_are_whole_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, 64, 5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) >= 2
    assert write(tmp_path, 64) == len(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    reader = ShardReader(tmp_path)
    assert all(torch.equal(reader.read(name), value) for name, value in TENSORS.items())


@pytest.mark.parametrize("damage", ["shorter", "longer", "another header", "not ours"])
def test_a_shard_that_cannot_be_right_is_made_again(damage: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, 64, 5)
    first, *others = sorted(tmp_path.iterdir())
    content = first.read_bytes()
    first.write_bytes(
        {
            "shorter": content[:-4],
            "longer": content + b"\0",
            "another header": content.replace(b"layer.0", b"layer.9"),
            "not ours": b"",
        }[damage]
    )
    assert write(tmp_path, 64) == len(others)
    assert first.read_bytes() == content


def test_without_being_told_nothing_is_taken_over(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, 64, 5)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\7")  # the same header and length
    assert write(tmp_path, 64, resume=False) == 0
    found = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
