"""Training tokens per second, beside Transformers' Trainer on a DeepseekV3 of equal shape.

    python scripts/bench_training.py [--model model/nano.yaml] [--threads 2] [--rounds 5]
        [--device cpu] [--out docs/benchmarks/training.json]

`same work`: our module under Lightning trains the top tier alone; the peer is that tier, exported
and loaded by Transformers, under `Trainer` (which runs on Accelerate). Same weights, tokens, scored
labels, AdamW (fused), clipping. Both compute the first loss alike, or nothing is measured. The peer
runs with each of its experts implementations, and the fastest one counts. `joint` is our
recipe's own step beside it: every example at the top tier and at a lower one, distilled.

Every round trains each contender for a few steps, in turn; a sample is the median step of a round,
its first ones left out. Wall time, and CPU time of the process beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer
from transformers.utils import logging as transformers_logging

from dvpa.checkpoint.export import export_tier
from dvpa.config import DvpaConfig, load_model_config
from dvpa.evaluate.report import describe_environment
from dvpa.model import DvpaForCausalLM
from dvpa.plan.machine import MACHINES
from dvpa.pricing import price
from dvpa_train.batches import IGNORED
from dvpa_train.config import OptimizerConfig, StageConfig, StrategyConfig
from dvpa_train.module import TierModule
from dvpa_train.processes import Processes
from dvpa_train.stages import quiet_lightning
from dvpa_train.strategies import trainer_arguments

WARM_UP = 2  # steps of a round that are not counted
# Transformers' implementations; not batched_mm, which copies a token's experts: 14 GB for nano.
EXPERTS = ("eager", "grouped_mm")
Batch = dict[str, Tensor]
Step = tuple[float, float]  # seconds: wall, CPU


class Stopwatch:
    """What every step took since the last one ended."""

    def __init__(self, device: str) -> None:
        self.device, self.steps, self.losses = device, list[Step](), list[float]()
        self._last: Step | None = None

    def tick(self) -> None:
        """A step has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.steps.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


class OurWatch(Stopwatch, Callback):
    """Lightning's hook."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """A step has ended."""
        self.losses.append(module.latest["loss"])
        self.tick()


class TheirWatch(Stopwatch, TrainerCallback):
    """Transformers' hook."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step has ended."""
        self.tick()


def make_batches(
    config: DvpaConfig, examples: int, length: int, steps: int
) -> list[dict[str, Tensor]]:
    """Random tokens [N, S]; the last position has no label, as it has none in Transformers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (steps, examples, length), generator=generator)
    return [{"input_ids": batch} for batch in ids]


def our_batch(batch: Batch) -> Batch:
    """As our collator gives it: labels in the place that predicts them."""
    ids = batch["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
    scored = torch.tensor([labels[:, :-1].numel(), 0])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "scored": scored,
    }


class Ours:
    """Our module, whole, under Lightning; the model goes on from round to round."""

    def __init__(self, model: DvpaForCausalLM, kind: str, arguments: argparse.Namespace) -> None:
        num_tiers = model.config.num_tiers
        lower = [1.0] * (num_tiers - 1)
        joint = kind == "joint"
        self.stage = StageConfig(
            kind,
            "joint" if joint else "expansion",
            num_tiers,
            steps=10**6,
            batch_size=arguments.examples,
            tier_weights=[*lower, 0.0] if joint else [*(0.0 for _ in lower), 1.0],
            distillation=0.5 * joint,
            switch_fraction=0.25 * joint,
        )
        self.model, self.arguments = model, arguments
        self.flops = 0.0  # of a step

    def train(self, batches: list[Batch]) -> OurWatch:
        """One step a batch."""
        arguments, watch = self.arguments, OurWatch(self.arguments.device)
        strategy = StrategyConfig(kind=arguments.strategy, precision=arguments.precision)
        module = TierModule(self.model.train(), self.stage, OptimizerConfig(), 0, strategy)
        trainer = LightningTrainer(
            max_steps=len(batches),
            logger=False,
            callbacks=[watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            precision=arguments.precision,
            **trainer_arguments(strategy, Processes(), OptimizerConfig().gradient_clip),
        )
        loader = DataLoader([our_batch(batch) for batch in batches], batch_size=None)
        trainer.fit(module, loader)
        self.flops = module.training_flops / len(batches)
        return watch


class Theirs:
    """Transformers' model under its Trainer."""

    def __init__(self, model: PreTrainedModel, folder: Path, arguments: argparse.Namespace) -> None:
        self.model, self.folder, self.arguments = model, folder, arguments

    def train(self, batches: list[Batch]) -> TheirWatch:
        """One step a batch, which the collator hands through as it is."""
        arguments, watch = self.arguments, TheirWatch(self.arguments.device)
        optimizer = OptimizerConfig()
        settings = TrainingArguments(
            str(self.folder / "trainer"),
            max_steps=len(batches),
            per_device_train_batch_size=1,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            max_grad_norm=optimizer.gradient_clip,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=arguments.precision == "bf16-mixed",
            use_cpu=arguments.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        trainer = TransformersTrainer(
            self.model.train(),
            settings,
            data_collator=lambda rows: rows[0],
            train_dataset=data,
            callbacks=[watch],
        )
        trainer.train()
        return watch


def first_losses(
    ours: DvpaForCausalLM, theirs: PreTrainedModel, batch: Batch
) -> tuple[float, float]:
    """The loss of the same tokens at the same weights, (ours, Transformers')."""
    ids = batch["input_ids"].to(ours.device)
    with torch.no_grad():
        logits = ours(ids, tiers=ours.config.num_tiers - 1, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        return float(loss), float(theirs(ids, labels=ids, use_cache=False).loss)


def median_step(watch: Stopwatch) -> Step:
    """Of a round, its first steps left out."""
    wall, cpu = zip(*watch.steps[WARM_UP - 1 :], strict=True)
    return statistics.median(wall), statistics.median(cpu)


def usable_experts(
    load: Callable[[str], PreTrainedModel],
    folder: Path,
    batches: list[Batch],
    arguments: argparse.Namespace,
) -> tuple[dict[str, Theirs], dict[str, str]]:
    """Transformers with each implementation that trains here, and why the others do not."""
    usable, reasons = {}, {}
    for name in EXPERTS:
        theirs = Theirs(load(name), folder, arguments)
        try:
            theirs.train(batches[:1])
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            reasons[name] = str(error).splitlines()[0][:200]
        else:
            usable[name] = theirs
    if not usable:
        raise RuntimeError(f"Transformers trains with none of {', '.join(EXPERTS)}: {reasons}")
    return usable, reasons


def row(samples: list[Step], tokens: int, flops: float, peak: float | None) -> dict[str, Any]:
    """A contender's medians over rounds."""
    wall, cpu = ([sample[i] for sample in samples] for i in (0, 1))
    found = {
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "step_seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "rounds_seconds": wall,
        "tokens_per_second": tokens / statistics.median(wall),
        "tokens_per_cpu_second": tokens / statistics.median(cpu),
    }
    if peak is not None:
        found["mfu"] = flops / statistics.median(wall) / peak
    return found


def gpu_peak(device: str) -> tuple[str | None, float | None]:
    """The GPU's name and its data sheet's dense bf16 FLOP/s, if we know it."""
    if device != "cuda":
        return None, None
    name = torch.cuda.get_device_name()
    known = [machine for key, machine in MACHINES.items() if key in name.lower()]
    return name, known[0].peak_flops if known else None


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders, in turn."""
    config = load_model_config(arguments.model)
    torch.manual_seed(0)
    DvpaForCausalLM(config).save_pretrained(folder / "dvpa")
    top = config.num_tiers - 1
    export_tier(folder / "dvpa", top, folder / "top")

    def mine() -> DvpaForCausalLM:
        model: DvpaForCausalLM = DvpaForCausalLM.from_pretrained(folder / "dvpa")
        return model.to(arguments.device)

    def load(experts: str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder / "top", dtype=torch.float32, experts_implementation=experts
        )
        return model.to(arguments.device)

    batches = make_batches(config, arguments.examples, arguments.length, WARM_UP + arguments.steps)
    losses = first_losses(mine(), load("eager"), batches[0])
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise RuntimeError(f"the models differ: first losses {losses[0]} and {losses[1]}")
    peers, reasons = usable_experts(load, folder, batches, arguments)
    contenders: dict[str, Ours | Theirs] = {
        "dvpa": Ours(mine(), "same", arguments),
        **{f"transformers {name}": peer for name, peer in peers.items()},
        "dvpa joint": Ours(mine(), "joint", arguments),
    }
    samples: dict[str, list[Step]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name, contender in contenders.items():
            watch = contender.train(batches)
            samples[name].append(median_step(watch))
            shown = samples[name][-1]
            print(f"round {number + 1} {name}: {shown[0]:.3f} s a step", file=sys.stderr)
    gpu, peak = gpu_peak(arguments.device)
    tokens = arguments.examples * arguments.length
    same = 6.0 * tokens * price(config).tiers[top].activated_params
    rows = {}
    for name, contender in contenders.items():
        flops = contender.flops if isinstance(contender, Ours) else same
        seen = 2 * tokens if name == "dvpa joint" else tokens
        rows[name] = row(samples[name], seen, flops, peak)
    best = min(peers, key=lambda name: float(rows[f"transformers {name}"]["step_seconds"]))
    fastest = rows[f"transformers {best}"]
    return {
        "benchmark": "training",
        "model": Path(arguments.model).name,
        "total_params": price(config).total_params,
        "device": gpu or "cpu",
        "peak_flops": peak,
        "precision": arguments.precision,
        "strategy": arguments.strategy,
        "threads": torch.get_num_threads(),
        "examples": arguments.examples,
        "length": arguments.length,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "first_losses": losses,
        "experts_implementation": best,
        "experts_unusable": reasons,
        "rows": rows,
        "ratio": {
            key: rows["dvpa"][key] / fastest[key]
            for key in ("tokens_per_second", "tokens_per_cpu_second")
        },
        "environment": describe_environment()
        | {name: metadata.version(name) for name in ("lightning", "accelerate")},
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; sizes depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="model/nano.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--strategy", default="single", help="ours: single, fsdp2, deepspeed")
    parser.add_argument("--examples", type=int, default=256, help="sequences a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a round")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/training.json"))
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "bf16-mixed" if arguments.device == "cuda" else "32-true"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure and write the JSON."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_lightning()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"] | {"ratio": result["ratio"]}, indent=1))


if __name__ == "__main__":
    main()
