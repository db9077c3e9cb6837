"""The header reader under any bytes: tensors that safetensors agrees with, or a ValueError."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from dvpa.checkpoint.headers import (
    INDEX_FILE,
    ITEM_BYTES,
    ShardHeaders,
    TensorInfo,
    raw_header,
    read_header,
    read_index,
)
from dvpa.checkpoint.shards import DTYPES

VALID = save(
    {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(4),
        "empty": torch.ones(0, 5),
    },
    metadata={"format": "pt"},
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F7", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON,
    }
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def check(path: Path, content: bytes) -> None:
    """Read; what is accepted is what safetensors reads, byte for byte."""
    path.write_bytes(content)
    try:
        infos = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    raw = raw_header(path)
    assert content.startswith(raw)
    assert len(raw) + sum(info.num_bytes for info in infos.values()) == len(content)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(infos)
        for name, info in infos.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape)


@settings(max_examples=100)
@given(st.binary(max_size=300))
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(b"\xff" * 8)
@example((100_000).to_bytes(8, "little") + b"[" * 100_000)
@example((60_001).to_bytes(8, "little") + b'{"a":' * 12_000 + b" ")
def test_any_bytes(path: Path, content: bytes) -> None:
    check(path, content)


@settings(max_examples=100)
@given(
    JSON | st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4), st.binary(max_size=40)
)
@example({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234")
@example({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, b"1234")
@example({"a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}, b"")
@example({"__metadata__": 3}, b"")
@example({"__metadata__": {"a": 3}}, b"")
def test_any_json(path: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    check(path, len(raw).to_bytes(8, "little") + raw + data)


@settings(max_examples=150)
@given(st.data())
def test_a_valid_file_with_bytes_changed(path: Path, data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    check(path, bytes(content[:cut]))


def test_the_valid_file_is_read(path: Path) -> None:
    path.write_bytes(VALID)
    infos = read_header(path)
    assert infos["model.layers.0.mlp.experts.0.up_proj.weight"] == TensorInfo("BF16", (2, 3))
    check(path, VALID)


@settings(max_examples=50)
@given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
@example({"weight_map": {"a": "../a.safetensors"}})
def test_any_index(path: Path, content: Any) -> None:
    index = path.with_name(INDEX_FILE)
    index.write_text(json.dumps(content))
    try:
        named = read_index(path.parent)
    except ValueError as error:
        assert str(index) in str(error)
    else:
        assert all(Path(file).name == file for file in named.values())
    try:
        ShardHeaders(path.parent)
    except (ValueError, FileNotFoundError):
        pass
    finally:
        index.unlink()


def test_dtypes_are_as_wide_as_pytorchs() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
