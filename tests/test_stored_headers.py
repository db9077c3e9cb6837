"""Headers in a database on the disk: the same as in memory, and memory that does not grow."""

import json
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assembly_world import save, weights, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dvpa.checkpoint.assemble import survey
from dvpa.checkpoint.headers import ShardHeaders
from dvpa.checkpoint.index_stream import INDEX_FILE, index_entries
from dvpa.checkpoint.scratch_database import ScratchDatabase
from dvpa.checkpoint.stored_headers import StoredHeaders

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FILES = st.text('ab"\\\u00e9.\t', min_size=1, max_size=5).filter(lambda s: Path(s).name == s)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@settings(max_examples=150)
@given(
    before=st.dictionaries(NAMES.filter(lambda s: s != "weight_map"), ANY, max_size=2),
    entries=st.dictionaries(NAMES, FILES, max_size=8),
    after=ANY,
    style=st.sampled_from([{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}]),
    block=st.sampled_from([1, 2, 7, 40, 1 << 16]),
)
def test_entries_are_what_the_json_module_reads(
    folder: Path,
    before: dict[str, Any],
    entries: dict[str, str],
    after: Any,
    style: dict[str, Any],
    block: int,
) -> None:
    data = {**before, "weight_map": entries, "end": after}
    (folder / INDEX_FILE).write_text(json.dumps(data, **style), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvpa.checkpoint.index_stream._BLOCK", block)
        assert list(index_entries(folder)) == list(entries.items())


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_index_is_no_other_index(folder: Path, data: st.DataObject) -> None:
    """Whatever is read from a text that is no JSON ends in an error; of JSON, it is the same."""
    text = json.dumps({"metadata": {"total_size": 12}, "weight_map": {"a": "x", "b": "x"}})
    place = data.draw(st.integers(0, len(text)))
    text = text[:place] + data.draw(st.text('{}[]:,"\\ ax1', max_size=3)) + text[place + 1 :]
    (folder / INDEX_FILE).write_text(text)
    try:
        found = list(index_entries(folder))
    except ValueError as error:
        assert str(folder / INDEX_FILE) in str(error)
    else:
        assert dict(found) == json.loads(text)["weight_map"]


def test_they_say_what_those_in_memory_say(tmp_path: Path) -> None:
    database = ScratchDatabase()
    for seed, shards in ((0, 1), (1, 3)):
        path = save(tmp_path / str(seed), weights(seed, fp8=True), shards=shards)
        kept, stored = ShardHeaders(path), StoredHeaders(path, database)
        items = {name: info for name, info, _ in stored.items_with("_nothing")}
        assert list(items.items()) == list(kept.tensors.items())
        assert len(stored) == len(kept.tensors)
        assert (stored.files, stored.has_index) == (kept.files, kept.has_index)
        assert all(stored.locate(name) == kept.locate(name) for name in kept.tensors)
        assert sum(stored.counts().values()) == len(stored)
        partners = {name: other for name, _, other in stored.items_with("_scale_inv")}
        for name in kept.tensors:
            if name.endswith("_scale_inv"):
                assert name not in partners
            else:
                assert partners[name] == kept.tensors.get(f"{name}_scale_inv")
        with pytest.raises(KeyError, match="nowhere"):
            stored.locate("nowhere")


def test_a_name_that_is_half_a_character_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    header = b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors: a tensor's name"):
        StoredHeaders(tmp_path, ScratchDatabase())


def test_a_full_disk_is_an_os_error() -> None:
    database = ScratchDatabase()
    database.run("PRAGMA max_page_count = 4")
    database.run("CREATE TABLE t (x TEXT)")
    with pytest.raises(OSError, match=r"full.*temporary database"):
        for _ in range(100):
            database.run("INSERT INTO t VALUES (?)", "x" * 1000)


def test_constraints_are_the_callers() -> None:
    database = ScratchDatabase()
    database.run("CREATE TABLE t (x INTEGER PRIMARY KEY)")
    assert database.run_many("INSERT INTO t VALUES (?)", [(i,) for i in range(600)]) == 600
    with pytest.raises(sqlite3.IntegrityError):
        database.run("INSERT INTO t VALUES (3)")
    assert [row[0] for row in database.rows("SELECT x FROM t ORDER BY x")] == list(range(600))


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Parents of 200 tensors a shard; Python's own peak, which has 19 bytes of each outcome.

    The first run fills caches that are filled once.
    """
    peaks = []
    for run, shards in enumerate((2, 2, 16)):
        parents = {}
        for seed, parent in enumerate("ab"):
            parents[parent] = tmp_path / f"{parent}{run}"
            parents[parent].mkdir()
            weight_map = {}
            for shard in range(shards):
                names = [f"model.layers.{shard}.mlp.experts.{i}.up_proj.weight" for i in range(200)]
                values = {name: np.full((4, 4), 1 + seed, np.float32) for name in names}
                file = f"model-{shard}.safetensors"
                save_file(values, parents[parent] / file)
                weight_map |= dict.fromkeys(names, file)
            (parents[parent] / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
            config = {"model_type": "qwen3_moe", "num_hidden_layers": shards}
            (parents[parent] / "config.json").write_text(json.dumps(config))
        rules = [{"match": "all", "lambda": {"a": 0.5, "b": 0.5}}]
        recipe = write_recipe(tmp_path / f"{run}.yaml", parents, rules)
        tracemalloc.start()
        assert survey(recipe, threads=1).tensors == 200 * shards
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    _, few, many = peaks
    # Bytes a tensor, numbers and their copies: names and places would be a kilobyte.
    assert many - few < 200 * 14 * 150
