"""What `dvpa plan --train` predicts beside what small runs on this CPU take.

    python scripts/bench_plan.py [--threads 1] [--steps 3] [--out docs/benchmarks/plan.json]

The machine is measured first, in the same run: one large matrix product (its peak), the experts'
grouped products (the share of the peak that they reach), one product of a large tensor with a
number, into fresh memory as in a training step (bandwidth), and a step of eight tokens (what a
layer costs before it computes). The numbers are no
blind forecast: bytes per logit and this calibration were corrected after earlier runs of these
rows.

Every row is two processes of its own: one is timed (median step), in the other the allocator gives
everything back at once, so that its high-water mark is what was alive.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpa.config import DvpaConfig, load_model_config
from dvpa.evaluate.report import describe_environment
from dvpa.model import DvpaForCausalLM
from dvpa.plan import Assumptions, Layout, Machine, TrainStage
from dvpa.plan.predict import predict
from dvpa.plan.stage_model import stage_model
from dvpa_kernels import make_routing, moe_mlp
from dvpa_train.config import OptimizerConfig, StageConfig
from dvpa_train.module import TierModule

WARM_UP = 1
# name: model, stage kind, tiers, examples, positions, recomputed. Batches are the recipes' own.
ROWS: dict[str, tuple[str, str, int, int, int, bool]] = {
    "pico, joint": ("pico", "joint", 3, 16, 64, False),
    "nano, foundation": ("nano", "foundation", 1, 256, 64, False),
    "nano, joint": ("nano", "joint", 4, 128, 64, False),
    "words, joint": ("words", "joint", 4, 16, 160, False),
    "110M, joint": ("110M", "joint", 4, 2, 256, False),
    "110M, joint, recomputed": ("110M", "joint", 4, 2, 256, True),
}


def model_config(name: str) -> DvpaConfig:
    """A shipped config, or one that is large enough for products to dominate."""
    if name != "110M":
        return load_model_config(f"model/{name}.yaml")
    tiers = [
        {
            "name": tier, "num_groups": groups, "top_k": k, "topk_group": groups,
            "routed_scaling_factor": k**0.5,
        }
        for groups, k, tier in [(1, 2, "base"), (2, 4, "small"), (4, 8, "medium"), (8, 16, "top")]
    ]  # fmt: skip
    return DvpaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=8, n_routed_experts=64, n_group=8,
        kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64, tiers=tiers,
    )  # fmt: skip


def stage_of(row: str) -> TrainStage:
    """The row's stage in the planner's words."""
    _, kind, num_tiers, examples, sequence, _ = ROWS[row]
    joint = kind == "joint"
    weights = (*(1.0,) * (num_tiers - 1), 0.0) if joint else ()
    return TrainStage(row, num_tiers, 1, examples, sequence, weights, joint, 0.25 * joint)


class Trainer:
    """A row's model and optimizer, stepped as Lightning would step them."""

    def __init__(self, config: DvpaConfig, stage: TrainStage, is_checkpointed: bool) -> None:
        torch.manual_seed(0)
        model = DvpaForCausalLM(config.truncate(stage.num_tiers)).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        kind = "joint" if stage.is_paired else "foundation"
        settings = StageConfig(
            stage.name, kind, stage.num_tiers, steps=100, batch_size=stage.examples,
            tier_weights=list(stage.tier_weights), distillation=0.5 * stage.is_paired,
            switch_fraction=stage.switch_fraction,
        )  # fmt: skip
        self.module = TierModule(model, settings, OptimizerConfig(), seed=0)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        ids = torch.randint(5, config.vocab_size, (stage.examples, stage.sequence + 1))
        self.batch = {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "attention_mask": torch.ones_like(ids[:, :-1]),
            "scored": torch.tensor([stage.examples * stage.sequence, 0]),
        }

    def step(self) -> None:
        """Forward, backward, clip, update, biases."""
        loss = self.module.training_step(self.batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.balancer.update(1e-3)


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    """Median wall time, after warming up."""
    seconds = []
    for round_index in range(WARM_UP + rounds):
        start = time.perf_counter()
        call()
        if round_index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def calibrate(memory_bytes: float) -> tuple[Machine, float]:
    """This machine, and the share of its peak that the experts' products reach."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    peak = 2 * size**3 / median_seconds(lambda: a @ b, 15)
    source = torch.zeros(32 << 20)
    moved = 2 * source.nbytes / median_seconds(lambda: source * 1.5, 7)
    share = _experts_flops() / peak
    config = load_model_config("model/pico.yaml")
    tiny = Trainer(config, TrainStage("tiny", 1, 1, 1, 8), False)
    passes = 3 * config.num_hidden_layers
    overhead = median_seconds(tiny.step, 30) / passes
    machine = Machine("cpu", memory_bytes, peak, moved, moved, moved, 1, overhead)
    return machine, share


def _experts_flops() -> float:
    """FLOP/s of the routed experts, forward and backward: 2048 rows, 16 experts, 256 x 256."""
    tokens, hidden, width, experts, slots = 512, 256, 256, 16, 4
    x = torch.randn(tokens, hidden, requires_grad=True)
    gate_up = torch.randn(experts, 2 * width, hidden, requires_grad=True)
    down = torch.randn(experts, hidden, width, requires_grad=True)
    index = torch.rand(tokens, experts).topk(slots).indices
    weight = torch.full((tokens, slots), 1 / slots, requires_grad=True)

    def work() -> None:
        moe_mlp(x, gate_up, down, make_routing(index, weight, experts), "cpu").sum().backward()

    flops = 3 * 2 * tokens * slots * 3 * hidden * width
    return flops / median_seconds(work, 15)


def high_water_mark() -> int:
    """Bytes: the largest resident size since `reset_mark`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(kilobytes)


def reset_mark() -> None:
    """Let the mark start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def saved_bytes(trainer: Trainer) -> int:
    """Bytes autograd keeps of one forward pass through the layers, parameters left out."""
    module, seen = trainer.module, dict[int, Tensor]()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    from dvpa_train.batches import assign_tiers

    rows = assign_tiers(trainer.batch, module.stage, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held, or the storages would be freed and their addresses used again.
        held = module.model.model(rows.input_ids, tiers=rows.tiers, use_cache=False)
    total = sum(t.untyped_storage().nbytes() for p, t in seen.items() if p not in own)
    del held
    return total


def measure(row: str, what: str, steps: int) -> dict[str, float]:
    """In a process of its own: a row's median step, or its memory."""
    config, stage, is_checkpointed = model_config(ROWS[row][0]), stage_of(row), ROWS[row][5]
    if what == "time":
        trainer = Trainer(config, stage, is_checkpointed)
        return {"step_seconds": median_seconds(trainer.step, steps)}
    Trainer(config, TrainStage("warm", 1, 1, 1, 8), False).step()  # libraries, thread pools
    reset_mark()
    before = high_water_mark()
    trainer = Trainer(config, stage, is_checkpointed)
    for _ in range(2):  # the second has the optimizer's state
        trainer.step()
    peak = high_water_mark() - before
    return {"memory_bytes": peak, "saved_bytes": saved_bytes(trainer)}


def run_row(row: str, what: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a child, whose allocator returns memory at once where memory is measured."""
    environment = dict(os.environ)
    if what == "memory":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--row", row, "--what", what]
    command += ["--threads", str(arguments.threads), "--steps", str(arguments.steps)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(row: str, machine: Machine, share: float, measured: dict[str, float]) -> dict[str, Any]:
    """A row's predictions beside its measurements."""
    assume = Assumptions(
        efficiency=min(share, 1.0), memory_efficiency=1.0, imbalance=1.0, compute_bytes=4.0,
        reserved_bytes=0.0,
    )  # fmt: skip
    stage, config = stage_of(row), model_config(ROWS[row][0])
    layout = Layout(1, 1, ROWS[row][5])
    found = predict(stage_model(config, stage), stage, layout, stage.examples, 1, machine, assume)
    memory = {line.name: line.value for line in found.memory}
    return {
        "row": row,
        "tokens": stage.tokens,
        "predicted": {
            "step_seconds": found.step_seconds,
            "memory_bytes": found.memory_bytes,
            "saved_bytes": memory["activations kept"],
            "mfu": found.mfu,
        },
        "time": {line.name: line.value for line in found.time},
        "memory": memory,
        "measured": measured,
    }


def main() -> None:
    """Measure the machine, then every row, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a row")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/plan.json"))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=["time", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")
    if arguments.row is not None:
        print(json.dumps(measure(arguments.row, arguments.what, arguments.steps)))
        return
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine, share = calibrate(float(memory_bytes))
    rows = []
    for row in ROWS:
        print(f"measuring {row}", file=sys.stderr)
        measured = run_row(row, "time", arguments) | run_row(row, "memory", arguments)
        rows.append(compare(row, machine, share, measured))
    result = {
        "benchmark": "plan",
        "threads": arguments.threads,
        "steps": arguments.steps,
        "machine": asdict(machine),
        "experts_share_of_peak": share,
        "rows": rows,
        "environment": describe_environment(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
