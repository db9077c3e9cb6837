"""The engine over a checkpoint that does not fit: same tokens, and easy traffic reads nothing."""

import random
from pathlib import Path

import pytest
from helpers import tiny_model
from residency_world import least_bytes, run_alone, write_large

from dvpa.engine import Engine, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    folder = tmp_path_factory.mktemp("resident")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("extra_groups", [0, 1, 100])
def test_tokens_are_those_of_the_whole_model(folder: Path, extra_groups: int) -> None:
    draws = random.Random(extra_groups)
    prompts = [[draws.randrange(3, 64) for _ in range(draws.randrange(1, 30))] for _ in range(12)]
    params = [
        SamplingParams(max_tokens=8, temperature=0, tier=draws.choice(["auto", "base", "middle"]))
        for _ in prompts
    ]
    whole = Engine(folder, dtype="float32")
    paged = Engine(folder, dtype="float32", max_resident_bytes=least_bytes(extra_groups))
    expected = [out.token_ids for out in whole.generate(prompts, params)]
    assert [out.token_ids for out in paged.generate(prompts, params)] == expected
    assert paged.store is not None
    assert paged.store.stats.bytes_read > 0
    assert paged.store.stats.resident_bytes <= least_bytes(extra_groups)
    paged.close()


def test_easy_traffic_reads_nothing(folder: Path) -> None:
    engine = Engine(folder, dtype="float32", max_resident_bytes=least_bytes())
    engine.generate([[5, 6, 7], [9, 8]], SamplingParams(max_tokens=6, temperature=0, tier="base"))
    assert engine.store is not None
    assert engine.store.stats.bytes_read == 0
    engine.close()


MEASURE = """
import sys
from pathlib import Path
import torch
from helpers import tiny_model
from dvpa.engine import Engine, SamplingParams

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

folder, bound = Path(sys.argv[1]), int(sys.argv[2])
params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, tier="base")
prompts = [[7 + i, 8, 9] for i in range(8)]
Engine(tiny_model(), cache_bytes=1 << 20).generate([[5, 6]], params)  # code, kernels, allocator
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = resident("VmRSS")
engine = Engine(folder, max_resident_bytes=bound, cache_bytes=1 << 20)
outs = engine.generate(prompts, params)
assert [len(out.token_ids) for out in outs] == [16] * 8
easy, stats = resident("VmHWM") - before, engine.store.stats
print(f"{bound=} {easy=} {stats}")
assert stats.bytes_read == 0
assert easy < bound
engine.generate(prompts, SamplingParams(max_tokens=2, temperature=0, tier="top"))
hard = resident("VmHWM") - before
assert engine.store.stats.bytes_read > 0
assert hard < bound + (8 << 20)
"""


@pytest.mark.slow
def test_a_checkpoint_four_times_the_bound(tmp_path: Path) -> None:
    bound = 64 << 20
    assert write_large(tmp_path) * 4 > 3.9 * bound
    run_alone(MEASURE, tmp_path, bound)
