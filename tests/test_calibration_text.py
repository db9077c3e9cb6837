"""The text that `convert` measures experts on, and the whole command with it."""

import json
from pathlib import Path

import pytest
import torch
from source_world import make_source

from dvpa.checkpoint.calibration_text import read_calibration
from dvpa.checkpoint.convert import RECORD_FILE
from dvpa.cli import main
from dvpa.model import DvpaForCausalLM
from dvpa.tasks.tokenizer import train_tokenizer

LINES = [f"the {word} of number {i} ." for i in range(400) for word in ("sum", "product", "order")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("text") / "source"
    make_source(folder, "olmoe", vocab_size=320)
    train_tokenizer(LINES[:200], 300, folder)
    (folder.parent / "text.txt").write_text("\n".join(LINES))
    return folder


def test_sequences_are_spread_over_the_text(source: Path) -> None:
    text = read_calibration(source, [source.parent / "text.txt"], 640, length=64)
    assert text.ids.shape == (10, 64)
    assert text.ids.dtype == torch.int64
    assert text.origin.startswith("text.txt (sha256 ")
    first = text.ids[:, 0].unique()
    assert len(first) == 1  # every sequence begins with the tokenizer's mark
    assert len({tuple(row.tolist()) for row in text.ids}) == 10
    assert len(text.held_out) == 3
    assert len(text.measuring) == 7
    rows = {tuple(row.tolist()) for row in torch.cat((text.held_out, text.measuring))}
    assert rows == {tuple(row.tolist()) for row in text.ids}
    again = read_calibration(source, [source.parent / "text.txt"], 640, length=64)
    assert torch.equal(again.ids, text.ids)
    assert again.origin == text.origin


def test_without_a_text_it_is_the_standard_library(source: Path) -> None:
    text = read_calibration(source, [], 256, length=64)
    assert text.ids.shape == (4, 64)
    assert text.origin.startswith("the library of Python 3.")


def test_bad_texts(source: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello there")
    with pytest.raises(ValueError, match=r"short.txt has too few tokens for 10 sequences of 64"):
        read_calibration(source, [tmp_path / "short.txt"], 640, length=64)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_calibration(source, [tmp_path / "nowhere.txt"], 640)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes.txt:1: not valid UTF-8"):
        read_calibration(source, [tmp_path / "bytes.txt"], 640)
    with pytest.raises(ValueError, match="no tokenizer there"):
        read_calibration(tmp_path, [], 640)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", str(source), str(tmp_path / "out"), "--tokens", "1024"]
    assert main([*argv, "--text", str(source.parent / "text.txt")]) == 0
    printed = capsys.readouterr().out
    for word in ("olmoe, before any tuning", "base", "middle", "top", "nats/token", "text.txt"):
        assert word in printed
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert (record["tokens"], record["held_out_tokens"]) == (768, 256)  # sequences of 128
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.tier_names == ["base", "middle", "top"]
    capsys.readouterr()
    argv = ["convert", str(source), str(tmp_path / "again"), "--keep-order", "--json", "-"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["text"] is None
    assert main(["generate", str(tmp_path / "out"), "the sum", "--tier", "base"]) == 0
