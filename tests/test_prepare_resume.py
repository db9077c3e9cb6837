"""Preparing with workers, killed and taken up again: the shards are those of one run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prepare_world import LINES, spoil, write_jsonl, write_tokenizer
from rich.console import Console

from dvpa_train import prepare as prepare_module
from dvpa_train.documents import Document
from dvpa_train.prepare import PrepareOptions, prepare
from dvpa_train.token_shards import Manifest, read_manifest


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_workers_do_not_change_a_byte(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES * 40)
    options = PrepareOptions(shard_tokens=5000)
    prepare([str(source)], tokenizer_folder, tmp_path / "1", options, workers=1)
    arguments = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "3")]
    arguments += ["--workers", "3", "--shard-tokens", "5000"]
    command = [sys.executable, "-m", "dvpa_train", "prepare", str(source), *arguments]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2,400 documents" in done.stdout
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "3").iterdir())
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


SLOWLY = """
import sys, time
from dvpa_train import prepare
encode = prepare._encode
def slow(tokenizer, batch):
    time.sleep(0.2)
    return [[] if d.text == "nothing" else ids for d, ids in zip(batch, encode(tokenizer, batch))]
prepare._encode = slow
from dvpa_train.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> tuple[list[str], Path]:
    """Sources, and what is left of a run over them that was killed after its third shard."""
    folder = tmp_path_factory.mktemp("killed")
    # Some that the reader, and some that the tokenizer finds empty, before and after the kill.
    texts = [text for line in LINES * 150 for text in (line, line, "", "nothing")]
    files = [
        str(write_jsonl(folder / "a.jsonl", texts)),
        str(write_jsonl(folder / "b.jsonl", LINES)),
    ]
    arguments = ["--tokenizer", str(tokenizer_folder), "--out", str(folder / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "prepare", *files, *arguments, "--shard-tokens", "2000"],
        env=_environment(),
    )
    half = folder / "out.incomplete"
    try:
        deadline = time.monotonic() + 120
        while not (half / "shard-00003.bin").exists():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return files, half


OPTIONS = PrepareOptions(shard_tokens=2000)


def _resume(
    killed: tuple[list[str], Path],
    tokenizer: Path,
    folder: Path,
    options: PrepareOptions = OPTIONS,
    damage: str = "",
) -> tuple[Manifest, str]:
    """Prepare where a copy of the killed run lies: the manifest, and what was said."""
    files, half = killed
    shutil.copytree(half, folder / "out.incomplete")
    if damage:
        spoil(folder / "out.incomplete", damage, "flipped")
    said = StringIO()
    manifest = prepare(
        files, tokenizer, folder / "out", options, console=Console(file=said, width=200)
    )
    assert not (folder / "out.incomplete").exists()
    return manifest, said.getvalue()


def test_kill_minus_nine_leaves_nothing_valid(killed: tuple[list[str], Path]) -> None:
    _, half = killed
    assert not half.with_suffix("").exists()
    with pytest.raises(FileNotFoundError, match="not a prepared folder"):
        read_manifest(half)


def test_a_rerun_keeps_whole_shards_and_changes_no_byte(
    killed: tuple[list[str], Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenised = []
    encode = prepare_module._encode

    def counted(tokenizer: object, batch: list[Document]) -> list[list[int]]:
        tokenised.extend(batch)
        pairs = zip(batch, encode(tokenizer, batch), strict=True)
        return [[] if document.text == "nothing" else ids for document, ids in pairs]

    monkeypatch.setattr(prepare_module, "_encode", counted)
    expected = prepare(killed[0], tokenizer_folder, tmp_path / "whole", OPTIONS)
    tokenised.clear()
    manifest, said = _resume(killed, tokenizer_folder, tmp_path)
    assert re.search(r"resumed: \d+ shards", said)
    assert manifest == expected
    assert manifest.skipped["empty"] == 2 * len(LINES) * 150
    kept = manifest.num_documents + len(LINES) * 150 - len(tokenised)
    assert kept > 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": PrepareOptions(shard_tokens=2000, eos=False)}, "another options than before"),
        pytest.param(
            {"damage": "shard-00001.bin"}, r"shard-00001\.bin: .*corrupt", marks=pytest.mark.slow
        ),
        pytest.param({"damage": "progress.json"}, "not resumed", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_is_started_over_and_says_so(
    change: dict[str, Any],
    reason: str,
    killed: tuple[list[str], Path],
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    manifest, said = _resume(killed, tokenizer_folder, tmp_path, **change)
    assert re.search(f"not resumed: .*{reason}" if reason != "not resumed" else reason, said)
    options = change.get("options", OPTIONS)
    assert manifest == prepare(killed[0], tokenizer_folder, tmp_path / "whole", options)


def test_a_changed_file_is_read_again_from_its_beginning(
    killed: tuple[list[str], Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    files, half = killed
    moved = [str(shutil.copy(file, tmp_path)) for file in files]  # same bytes, another path
    manifest, said = _resume((moved, half), tokenizer_folder, tmp_path)
    assert "not resumed: another files than before" in said
    assert manifest.num_documents > 0
