"""`dvpa convert` and `dvpa export` in several goes end as in one, with what was measured."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_world import make_fp8_source
from source_world import text
from torch import Tensor

from dvpa.checkpoint import ShardWriter, convert_checkpoint, export_tier
from dvpa.checkpoint.expert_choice import CHOICE_FILE
from dvpa.cli import main

WRITE = ShardWriter.write
SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's format, FP8: a scale may begin another shard than its weight ended."""
    return make_fp8_source(tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """Converted in one go; never written to."""
    convert(source, source.parent / "converted")
    return source.parent / "converted"


@pytest.fixture(scope="module")
def exported(converted: Path) -> Path:
    export(converted, converted.parent / "exported")
    return converted.parent / "exported"


def convert(source: Path, out: Path, **options: Any) -> Any:
    options = {"shard_bytes": SHARD_BYTES, "pool": "prefix", **options}
    return convert_checkpoint(source, out, text(), **options)


def export(checkpoint: Path, out: Path, **options: Any) -> Any:
    return export_tier(checkpoint, "top", out, **{"shard_bytes": SHARD_BYTES, **options})


def stop_after(patch: pytest.MonkeyPatch, count: int, stop: Callable[[], object]) -> None:
    """`stop` is called instead of the write numbered `count`."""
    left = iter(range(count))

    def write(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if next(left, None) is None:
            stop()
        WRITE(self, name, tensor)

    patch.setattr(ShardWriter, "write", write)


def fail() -> None:
    raise OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, Any]:
    """Every file; of the record of a conversion all but how it came about."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    if "conversion.json" in found:
        record = json.loads(found["conversion.json"])
        record.pop("resumed_shards")
        found["conversion.json"] = record
    return found


@pytest.mark.parametrize("what", ["convert", "export"])
def test_whatever_was_written_when_it_failed(
    what: str, source: Path, converted: Path, exported: Path, tmp_path: Path
) -> None:
    origin, whole, make = (
        (source, converted, convert) if what == "convert" else (converted, exported, export)
    )
    resumed = []
    for number, count in enumerate((0, 7, 20, 21, 22, 45, 70)):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, count, fail)
            with pytest.raises(OSError, match="No space left"):
                make(origin, out)
        assert not out.exists()
        resumed.append(make(origin, out).resumed_shards)
        assert contents(out) == contents(whole)
    assert resumed == sorted(resumed)
    assert resumed[0] == 0
    assert resumed[-1] > 5


def test_what_was_measured_is_not_measured_again(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 30, fail)
        with pytest.raises(OSError, match="No space left"):
            convert(source, out)
    assert (tmp_path / "out.incomplete" / CHOICE_FILE).is_file()
    monkeypatch.setattr("dvpa.checkpoint.expert_choice.measure_importance", None)
    assert convert(source, out).resumed_shards > 0
    assert contents(out) == contents(converted)


@pytest.mark.parametrize("change", ["option", "source", "text"])
def test_another_conversion_starts_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_fp8_source(tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 30, fail)
        with pytest.raises(OSError, match="No space left"):
            convert(source, out)
    if change == "option":
        report = convert(source, out, dtype="bfloat16")
    elif change == "source":
        os.utime(next(source.glob("*.safetensors")))
        report = convert(source, out)
    else:
        report = convert_checkpoint(
            source, out, text(seed=9), shard_bytes=SHARD_BYTES, pool="prefix"
        )
    assert report.resumed_shards == 0


@pytest.mark.parametrize("what", ["convert", "export"])
def test_kill_minus_9_at_any_write(
    what: str, source: Path, converted: Path, exported: Path, tmp_path: Path
) -> None:
    """Killed again and again, further each time; never a folder, and then the right one."""
    origin, whole, make = (
        (source, converted, convert) if what == "convert" else (converted, exported, export)
    )
    out = tmp_path / "out"
    for count in (3, 11, 26, 40):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(1)  # a forked process has none of its parent's
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
                make(origin, out)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not out.exists()
    assert make(origin, out).resumed_shards > 0
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_points_to_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(convert_checkpoint.__kwdefaults__, "shard_bytes", SHARD_BYTES)
    command = ["convert", str(source), str(tmp_path / "out"), "--keep-order"]
    with monkeypatch.context() as patch:
        stop_after(patch, 60, fail)
        assert main(command) != 0
    error = capsys.readouterr().err
    assert "finished shards; the same command goes on from there" in error
    assert main(command) == 0
    assert "were finished by an earlier run" in capsys.readouterr().out
