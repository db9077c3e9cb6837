"""Experts on disk, about one in each shard: stores over them, the model as it is, and damage."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import moe_layers, thresholds, tiny_config, tiny_model

from dvpa.checkpoint import ShardReader, ShardWriter, TensorInfo
from dvpa.config import DvpaConfig
from dvpa.engine.residency import ExpertStore, _group_bytes
from dvpa.engine.weights import WeightFiles, other_bytes
from dvpa.model import DvpaForCausalLM
from dvpa.model.tensor_names import expert_index, tensor_shapes
from dvpa_kernels.cpu.library import status
from dvpa_kernels.cpu.op import MAX_ROWS_PER_EXPERT

PLENTY = 10**9
LAYERS, BASE, GROUPS, SIZE = 2, 1, 4, 4  # of tiny_config: MoE layers, groups and their experts
UPPER = GROUPS - BASE


def write_sharded(model: DvpaForCausalLM, folder: Path) -> Path:
    """Save a model, about one expert in each shard (Transformers writes layer by layer)."""
    with TemporaryDirectory() as temporary:
        saved = Path(temporary)
        model.save_pretrained(saved)
        reader = ShardReader(saved)
        plan = {name: reader.tensors[name] for name in tensor_shapes(model.config)}
        folder.mkdir(exist_ok=True)
        with ShardWriter(folder, plan, shard_bytes=3 * 16 * 32 * 4) as writer:
            for name in plan:
                writer.write(name, reader.read(name))
        for name in ("config.json", "tier_map.json"):
            (folder / name).write_bytes((saved / name).read_bytes())
    return folder


def write_tiny(folder: Path) -> Path:
    """tiny_model in fp32, with a tier map that uses every tier."""
    model = tiny_model()
    model.tier_map = thresholds(model, 0.3, 0.6)
    return write_sharded(model, folder)


@contextmanager
def stores() -> Iterator[Callable[..., ExpertStore]]:
    """Make stores with a number of upper slots, and close them in the end."""
    opened = []

    def make(
        folder: Path, upper_slots: int, dtype: torch.dtype = torch.float32, **options: Any
    ) -> ExpertStore:
        config = DvpaConfig.from_pretrained(folder)
        pinned = config.tiers[0].num_groups * len(range(1, config.num_hidden_layers))
        weights = WeightFiles(folder, config, **options)
        store = ExpertStore(config, weights, pinned + upper_slots, dtype=dtype)
        opened.append(store)
        return store

    try:
        yield make
    finally:
        for store in opened:
            store.close()


def least_bytes(extra_groups: int = 0) -> int:
    """The smallest bound that is accepted, and some groups more."""
    config, dtype = tiny_config(), torch.float32
    base, upper, layers = config.tiers[0].num_groups, 3, 2
    groups = base * layers + upper + extra_groups
    return other_bytes(config, dtype) + groups * _group_bytes(config, dtype)


def random_table(tokens: int, groups: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts of the groups, [T, 4] with some slots empty, and weights with NaN there."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor([g * SIZE + i for g in groups for i in range(SIZE)])
    order = torch.rand(tokens, len(experts), generator=generator).argsort(1)[:, :4]
    empty = torch.rand(tokens, 4, generator=generator) < 0.2
    weight = torch.rand(tokens, 4, generator=generator).masked_fill(empty, float("nan"))
    return experts[order].masked_fill(empty, GROUPS * SIZE), weight


def unpaged(
    model: DvpaForCausalLM, layer: int, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """What the layer's own experts compute."""
    from dvpa.ops import expert_mlp

    experts = model.model.layers[layer].mlp.experts
    return expert_mlp(x, experts.gate_up_proj, experts.down_proj, index, weight)


def page(model: DvpaForCausalLM, store: ExpertStore) -> DvpaForCausalLM:
    """The model with its experts computed by the store."""
    for layer, moe in zip(store.layers, moe_layers(model), strict=True):
        moe.experts.forward = lambda hidden, routing, layer=layer: store.experts(
            layer, hidden, routing.topk_index, routing.topk_weight
        )
    return model


def wait_until(done: Callable[[], bool]) -> None:
    """Wait; 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, "nothing happened for 20 seconds"
        time.sleep(0.002)


def never_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """No handing over to F.grouped_mm, which sums otherwise: it depends on rows and machine."""
    for isa in MAX_ROWS_PER_EXPERT:
        monkeypatch.setitem(MAX_ROWS_PER_EXPERT, isa, (4096, 4096))


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    """Bitwise with the kernel; without a compiler F.grouped_mm sums in the arena's order."""
    if status().isa is None:
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(left, right)


def upper_shard(folder: Path, layer: int, group: int) -> Path:
    """A shard that holds nothing but experts of one upper group."""
    reader = ShardReader(folder)
    name = f"model.layers.{layer}.mlp.experts.{group * SIZE + 2}.up_proj.weight"
    path, _ = reader.locate(name)
    inside = [n for n in reader.tensors if reader.locate(n)[0] == path]
    assert {(expert_index(n) or 0) // SIZE for n in inside} == {group}, inside
    return path


def truncate(path: Path) -> None:
    """Cut the end off."""
    path.write_bytes(path.read_bytes()[:-100])


MEASURE_RSS = """
import sys
from pathlib import Path
import torch
from helpers import tiny_config, tiny_model
from residency_world import page
from dvpa.engine.residency import load_resident

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

folder, bound, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
ids = torch.arange(3, 35)[None]
with torch.no_grad():
    tiny_model(tiny_config()).to(dtype)(ids, tiers=2)  # code, kernels, allocator
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = resident("VmRSS")
    model, store = load_resident(folder, dtype=dtype, max_resident_bytes=bound)
    page(model, store)
    model(ids, tiers=0)
    assert store.stats.bytes_read == 0
    easy, easy_peak = resident("VmRSS") - before, resident("VmHWM") - before
    counted = store.stats.resident_bytes
    for step in range(3):
        store.prefetch(1)
        assert model(ids, tiers=1).logits.isfinite().all()
    hard_peak = resident("VmHWM") - before
slack = 8 << 20
# On CPUs with bf16 instructions oneDNN takes scratch for its products.
products = (16 if dtype == torch.bfloat16 else 0) << 20
print(f"{bound=} {counted=} {easy=} {easy_peak=} {hard_peak=} {store.stats}")
assert 0.9 * counted < easy < counted + slack, "the counter is not what the process takes"
assert easy_peak < counted + slack
assert store.stats.evictions > 0 and store.stats.resident_bytes <= bound
assert hard_peak < bound + slack + products
"""


def large_config() -> DvpaConfig:
    """64M parameters, nearly all in upper groups."""
    return tiny_config(
        hidden_size=256, moe_intermediate_size=320, num_hidden_layers=9, n_routed_experts=32,
        n_group=16, vocab_size=512,
        tiers=[
            {"name": "base", "num_groups": 1, "top_k": 2, "topk_group": 1,
             "routed_scaling_factor": 1.0},
            {"name": "top", "num_groups": 16, "top_k": 4, "topk_group": 16,
             "routed_scaling_factor": 1.0},
        ],
    )  # fmt: skip


def write_large(folder: Path) -> int:
    """A checkpoint of `large_config`; returns its parameters."""
    config = large_config()
    plan = {name: TensorInfo("F32", shape) for name, shape in tensor_shapes(config).items()}
    with ShardWriter(folder, plan, shard_bytes=40_000_000) as writer:
        for name, info in plan.items():
            writer.write(name, torch.randn(info.shape).mul_(0.05))
    config.save_pretrained(folder)
    return sum(info.num_bytes for info in plan.values()) // 4


def run_alone(script: str, *arguments: object) -> None:
    """A script in a process of its own, which asserts.

    Without oneDNN's cache of code, which holds more or less at a time, whatever the paging does.
    """
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, **own},  # this folder, too
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
