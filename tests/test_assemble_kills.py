"""Failures and kills while assembling: never a wrong folder, and the next run ends well.

DVPA_KILL_TRIALS: how many random kills (default 2; the full rehearsal is 20).
"""

import os
import random
import shutil
import signal
import subprocess
import time
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
    formula,
    load,
    same,
    save,
    save_parents,
    weights,
    write_recipe,
)

from dvpa.checkpoint.assemble import assemble
from dvpa.checkpoint.folders import INCOMPLETE_MARK
from dvpa.checkpoint.index_stream import INDEX_FILE
from dvpa.checkpoint.shard_files import ShardFiles

TRIALS = int(os.environ.get("DVPA_KILL_TRIALS", "2"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_parents(tmp_path_factory.mktemp("pristine"), "ab", fp8=True)


@pytest.fixture
def world(pristine: dict[str, Path], tmp_path: Path) -> Path:
    """Parents a and b that may be damaged, and a recipe."""
    return copied_world(pristine, tmp_path)


def check(world: Path) -> None:
    """The folder is complete and right to the bit; FP8 against an undisturbed run."""
    result, whole = load(world / "out"), load(world / "whole")
    left, right = load(world / "a"), load(world / "b")
    assert result.keys() == whole.keys() == left.keys()
    for name, tensor in result.items():
        assert same(tensor, whole[name]), name
        if tensor.dtype == torch.bfloat16:
            assert same(tensor, formula([0.6, 0.4], [left[name], right[name]])), name
    assert not (world / "out.incomplete").exists()
    names = {path.name for path in (world / "whole").iterdir()}
    assert {path.name for path in (world / "out").iterdir()} == names
    for name in ("assembly_tensors.csv", "config.json", INDEX_FILE):
        assert (world / "out" / name).read_bytes() == (world / "whole" / name).read_bytes()


def fail_after(monkeypatch: pytest.MonkeyPatch, seals: int) -> None:
    """The disk is full once so many shards are finished."""
    seal, count = ShardFiles._seal, iter(range(100))

    def failing(self: ShardFiles, shard: str) -> None:
        if next(count) >= seals:
            raise OSError(28, "No space left on device", shard)
        seal(self, shard)

    monkeypatch.setattr(ShardFiles, "_seal", failing)


def test_the_next_run_goes_on_with_the_shards_that_were_finished(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(world / "r.yaml", world / "whole")
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        with pytest.raises(OSError, match="No space left"):
            assemble(world / "r.yaml", world / "out")
    staging = world / "out.incomplete"
    assert len(list(staging.glob("*.safetensors"))) == 2
    assert not (staging / "config.json").exists()
    assert not (staging / INDEX_FILE).exists()
    report = assemble(world / "r.yaml", world / "out")
    assert report.resumed_shards == 2
    check(world)


def test_a_finished_shard_that_was_touched_is_made_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(world / "r.yaml", world / "whole")
    with monkeypatch.context() as patch:
        fail_after(patch, 3)
        with pytest.raises(OSError, match="No space left"):
            assemble(world / "r.yaml", world / "out")
    first, second, _ = sorted((world / "out.incomplete").glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(bytes(content))
    journal = second.with_name(f"{second.name}.journal.json")
    journal.write_text(journal.read_text()[:-20])
    assert assemble(world / "r.yaml", world / "out").resumed_shards == 1
    check(world)


def test_another_recipe_or_another_parent_starts_anew(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("recipe", "parent"):
        with monkeypatch.context() as patch:
            fail_after(patch, 2)
            with pytest.raises(OSError, match="No space left"):
                assemble(world / "r.yaml", world / "out")
        if change == "recipe":
            write_recipe(
                world / "r.yaml", {n: world / n for n in "ab"}, [{**MIX, "lambda": {"b": 1.0}}]
            )
        else:
            edit(world / "b", lambda t: t.update({GATE: t[GATE] * 2}) if GATE in t else None)
        report = assemble(world / "r.yaml", world / "out")
        assert report.resumed_shards == 0
        result, right = load(world / "out"), load(world / "b")
        assert all(same(result[name], right[name]) for name in right)
        shutil.rmtree(world / "out")


def test_one_run_at_a_time(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = ShardFiles.finish
    tried: list[str] = []

    def meanwhile(self: ShardFiles, name: str, record: Any = None) -> None:
        if not tried:
            tried.append(name)
            with pytest.raises(ValueError, match=r"out.incomplete: another run is writing it"):
                assemble(world / "r.yaml", world / "out")
        finish(self, name, record)

    monkeypatch.setattr(ShardFiles, "finish", meanwhile)
    assemble(world / "r.yaml", world / "out", threads=1)
    assert tried


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Whatever a kill leaves, a folder that loads is right, and the next run ends well."""
    moments, killed = random.Random(), 0
    for i, name in enumerate("ab"):  # larger, so that writing takes a while
        tensors = weights(i)
        for copy in range(60):
            tensors[f"model.extra.{copy}"] = torch.randn(256, 1024).bfloat16()
        save(tmp_path / name, tensors, shards=12)
    write_recipe(tmp_path / "r.yaml", {n: tmp_path / n for n in "ab"}, [MIX])
    assemble(tmp_path / "r.yaml", tmp_path / "whole")
    started = time.perf_counter()
    subprocess.run(command(tmp_path), check=True, capture_output=True)
    length = time.perf_counter() - started
    shutil.rmtree(tmp_path / "out")
    resumed = 0
    for _ in range(TRIALS):
        process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL)
        staging = tmp_path / "out.incomplete"
        if moments.random() < 0.5:  # anywhere, or while it writes
            time.sleep(moments.uniform(0, length))
        else:
            while process.poll() is None and not list(staging.glob("*.journal.json")):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, length / 10))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            check_killed(tmp_path)
        else:
            is_loadable = (staging / "config.json").exists() and (staging / INDEX_FILE).exists()
            assert not is_loadable or same_weights(staging, tmp_path / "whole")
            resumed += assemble(tmp_path / "r.yaml", tmp_path / "out").resumed_shards
        check(tmp_path)
        shutil.rmtree(tmp_path / "out")
    print(f"{killed} of {TRIALS} runs killed, {resumed} shards taken over")
    assert killed or TRIALS == 0


def check_killed(world: Path) -> None:
    """Killed after the rename: all there; at most the mark is left."""
    (world / "out" / INCOMPLETE_MARK).unlink(missing_ok=True)


def same_weights(left: Path, right: Path) -> bool:
    loaded, wanted = load(left), load(right)
    return loaded.keys() == wanted.keys() and all(same(loaded[n], wanted[n]) for n in wanted)
