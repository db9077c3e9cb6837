"""From files to shards: what is written is what was read; what is unusable or damaged is named."""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from prepare_world import LINES, spoil, write_jsonl, write_tokenizer

from dvpa_train.cli import main
from dvpa_train.documents import expand, read_documents
from dvpa_train.prepare import PrepareOptions, prepare, verify
from dvpa_train.token_shards import MANIFEST, TokenShardWriter, dtype_for, map_shard, read_manifest
from dvpa_train.tokenizer_files import load_tokenizer, tokenizer_hash


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _read(folder: Path) -> list[list[int]]:
    """Every document of a prepared folder."""
    manifest = read_manifest(folder)
    documents = []
    for shard in manifest.shards:
        tokens, offsets = map_shard(folder, manifest, shard)
        documents += [tokens[a:b].tolist() for a, b in pairwise(offsets)]
    return documents


def test_documents_come_out_as_they_went_in(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    options = PrepareOptions(shard_tokens=300)
    manifest = prepare([str(source)], tokenizer_folder, tmp_path / "out", options)
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = _read(tmp_path / "out")
    expected = [[1, *tokenizer.encode(line, add_special_tokens=False), 2] for line in LINES]
    assert documents == expected
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents] == LINES
    assert len(manifest.shards) > 2
    assert all(shard.num_tokens >= 300 for shard in manifest.shards[:-1])
    assert manifest.num_tokens == sum(map(len, expected))
    assert (manifest.num_documents, manifest.skipped) == (len(LINES), {})
    assert (manifest.bos_id, manifest.eos_id, manifest.dtype) == (1, 2, "uint16")
    assert manifest.tokenizer_sha256 == tokenizer_hash(tokenizer_folder)
    assert [(s.path, s.num_bytes) for s in manifest.sources] == [
        (str(source), source.stat().st_size)
    ]
    assert verify(tmp_path / "out") == manifest


def test_special_tokens_are_a_choice(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES[:3])
    options = PrepareOptions(bos=False, eos=True)
    manifest = prepare([str(source)], tokenizer_folder, tmp_path / "out", options)
    assert (manifest.bos_id, manifest.eos_id) == (None, 2)
    assert all(ids[0] != 1 and ids[-1] == 2 for ids in _read(tmp_path / "out"))


def test_wide_vocabularies_get_wide_tokens(tmp_path: Path) -> None:
    assert [dtype_for(n) for n in (65_536, 65_537)] == ["uint16", "uint32"]
    writer = TokenShardWriter(tmp_path, "uint32", 10)
    writer.add([129_279, 0])
    writer.close()
    stored = np.fromfile(tmp_path / "shard-00000.bin", "<u4")
    assert stored.tolist() == [129_279, 0]
    with pytest.raises(ValueError, match="at least one token"):
        writer.add([])


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\ntwo\n\n\nthree\nfour"]),
        ("paragraph", ["one\ntwo", "three\nfour"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_what_a_document_is_in_a_text_file(tmp_path: Path, unit: str, expected: list[str]) -> None:
    for path, write in (
        (tmp_path / "a.txt", Path.write_bytes),
        (tmp_path / "a.txt.gz", lambda p, b: p.write_bytes(gzip.compress(b))),
    ):
        write(path, b"one\ntwo\n\n\nthree\nfour")
        found = list(read_documents(path, "text", unit))  # type: ignore[arg-type]
        assert [document.text for document in found] == expected
        assert found[-1].where.startswith(str(path))
        assert not any(document.problem for document in found)


def test_unusable_documents_are_counted_by_reason(tmp_path: Path, tokenizer_folder: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "\xff"}',  # not UTF-8
        b'{"text": "\\ud800"}',  # half a surrogate pair
        b'{"text": ',
        b'{"other": "x"}',
        b"[1]",
        b'{"text": 3}',
        b'{"text": "  "}',
        b"",
    ]
    bad.write_bytes(b"\n".join(lines))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_bytes(b"")
    files = [str(tmp_path / name) for name in ("bad.jsonl", "bad.txt", "empty.txt")]
    manifest = prepare(files, tokenizer_folder, tmp_path / "out")
    assert manifest.num_documents == 1
    assert manifest.skipped == {"bad_json": 1, "bad_utf8": 3, "empty": 2, "no_text": 3}
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: bad_utf8"):
        prepare(files, tokenizer_folder, tmp_path / "strict", PrepareOptions(strict=True))
    assert not (tmp_path / "strict").exists()
    with pytest.raises(ValueError, match="no usable document in 2 files"):
        prepare(files[1:], tokenizer_folder, tmp_path / "none")


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", LINES[:2]))
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:20])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    good = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    full = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "full")]
    cases: list[tuple[list[str], str]] = [
        (["prepare", str(tmp_path / "no*.txt"), *good], "no such file"),
        (["prepare", str(tmp_path / "a.csv"), *good], "its ending must be one of .txt"),
        (["prepare", source, source, *good], "given twice"),
        (["prepare", str(tmp_path / "torn.jsonl.gz"), *good], "not a whole gzip file"),
        (["prepare", source, *full], "not empty"),
        (["prepare", source, *good[2:], "--tokenizer", str(tmp_path)], "no tokenizer.json"),
        (["prepare", source, *good, "--shard-tokens", "0"], "1 or more"),
        (["prepare", source, *good, "--field", "body"], "no usable document"),
        (["verify", str(tmp_path)], "not a prepared folder"),
        (["verify"], "FOLDER"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_are_taken_in_their_order_and_globs_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    found = expand([str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt")])
    assert [path.name for path in found] == ["c.jsonl", "a.txt", "b.txt"]


def test_parquet_needs_its_extra(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"dvpa\[parquet\]"):
        prepare([str(tmp_path / "a.parquet")], tokenizer_folder, tmp_path / "out")


def test_parquet_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["one", None, "", "two"]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2, 3, 4]}), path)
    found = list(read_documents(path, "body", "file"))
    assert [d.text for d in found] == ["one", "", "", "two"]
    assert [d.problem for d in found] == [None, "no_text", "empty", None]
    assert found[1].where == f"{path}: row 2"
    with pytest.raises(ValueError, match="no column 'text' among body, n"):
        list(read_documents(path, "text", "file"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a\.parquet"):
        list(read_documents(path, "body", "file"))


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.idx"])
def test_damaged_shards_are_named(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    for how, error, message in (
        ("missing", FileNotFoundError, "missing"),
        ("short", ValueError, "truncated"),
        ("flipped", ValueError, "corrupt"),
    ):
        out = tmp_path / how
        prepare([str(source)], tokenizer_folder, out, PrepareOptions(shard_tokens=300))
        spoil(out, name, how)
        with pytest.raises(error, match=f"{name}.*{message}"):
            verify(out)
        if how == "flipped":
            read_manifest(out)  # the size is right: only `verify` reads everything
        else:
            with pytest.raises(error, match=name):
                read_manifest(out)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [], "sources": []}', '{"a": 1'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_reformatting_a_tokenizer_changes_nothing_but_a_token_does(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["padding"] = {"strategy": "BatchLongest"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert tokenizer_hash(tmp_path) == tokenizer_hash(tokenizer_folder)
    content["model"]["vocab"]["entirely new"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_hash(tmp_path) != tokenizer_hash(tokenizer_folder)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        tokenizer_hash(tmp_path)
