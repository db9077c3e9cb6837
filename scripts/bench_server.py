"""What HTTP costs: the engine alone beside the same engine behind the server, streaming.

    python scripts/bench_server.py [--rounds 5] [--threads 2]

One random model (configs/model/bench-500m.yaml), bf16, greedy, top tier, the same prompts for all:
`Engine.generate`, `Engine.stream`, and `dvpa serve` with a thin client in another process of the
same machine, all requests at once. Every contender has processes of its own, once per round, the
first one changing; medians over rounds. Every token is a word of text, so that all pay for
detokenising and the server has an event to send for each.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench_engine import describe_model, environment
from engine_peers import MAX_OTHERS, WARM_UP, Case, Tokens, check_lengths, timed
from kernel_timing import describe_machine, describe_versions
from server_load import ROOT, STREAMING, Answer, Server, post

GENERATE, STREAM, HTTP = "Engine.generate", "Engine.stream", "dvpa serve"
JOB_SECONDS = 3600
TICK_S = 0.01  # CPU time is counted in these: a tiny run may have had none
MODEL_NAME = "bench"
Row = dict[str, Any]


@dataclass
class Sample:
    """What a run of one case gave."""

    counts: list[int]  # tokens of every request
    texts: list[str]
    first_ms: list[float]  # until a request's first token was there
    extra: Row = field(default_factory=dict)


class Contender(Protocol):
    """Completes prompts, all at once, greedily, exactly `tokens_out` tokens each."""

    def run(self, prompts: Tokens, tokens_out: int) -> Any:
        """The part that is timed."""
        ...

    def read(self, found: Any) -> Sample:
        """What `run` found."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Alone:
    """The engine without a server."""

    def __init__(self, job: Row, streams: bool) -> None:
        import dvpa

        self._engine = dvpa.Engine(job["checkpoint"], dtype="bfloat16", **job["engine"])
        self._params, self._tier, self._streams = dvpa.SamplingParams, job["tier"], streams

    def run(self, prompts: Tokens, tokens_out: int) -> Any:
        params = self._params(
            max_tokens=tokens_out, temperature=0, ignore_eos=True, tier=self._tier
        )
        if self._streams:
            return asyncio.run(self._stream(prompts, params))
        outputs = self._engine.generate(prompts, params)
        return [(len(o.token_ids), o.text, o.telemetry.ttft_ms) for o in outputs]

    def read(self, found: Any) -> Sample:
        return Sample(*map(list, zip(*found, strict=True)))

    async def _stream(self, prompts: Tokens, params: Any) -> list[tuple[int, str, float]]:
        async def one(prompt: list[int]) -> tuple[int, str, float]:
            start, first, count, texts = time.perf_counter(), 0.0, 0, list[str]()
            async for piece in self._engine.stream(prompt, params):
                first = first or 1e3 * (time.perf_counter() - start)
                count += len(piece.token_ids)
                texts.append(piece.text)
            return count, "".join(texts), first

        return await asyncio.gather(*map(one, prompts))

    def close(self) -> None:
        self._engine.close()


class OverHttp:
    """`dvpa serve` in a child process; this process is the client."""

    def __init__(self, job: Row) -> None:
        self._tier = job["tier"]
        self._server = Server(
            Path(job["checkpoint"]),
            Path(job["folder"]),
            threads=job["threads"],
            dtype="bfloat16",
            model_name=MODEL_NAME,
            engine=job["engine"],
        )
        self._server.start()

    def run(self, prompts: Tokens, tokens_out: int) -> Any:
        common = {
            "model": MODEL_NAME,
            "max_tokens": tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "dvpa": {"tier": self._tier},
            **STREAMING,
        }

        async def all_of_them() -> list[Answer]:
            bodies = ({**common, "prompt": prompt} for prompt in prompts)
            port = self._server.port
            return await asyncio.gather(*(post(port, "/v1/completions", b) for b in bodies))

        start = time.process_time()
        answers = asyncio.run(all_of_them())
        return answers, time.process_time() - start

    def read(self, found: Any) -> Sample:
        answers, client_cpu_s = found
        for answer in answers:
            if answer.status != 200 or answer.is_truncated:
                why = answer.error or answer.body[:300].decode(errors="replace")
                raise RuntimeError(f"status {answer.status}: {why}")
        return Sample(
            [answer.completion_tokens for answer in answers],
            [answer.text for answer in answers],
            [1e3 * (answer.times[0] - answer.started) for answer in answers],
            {
                "client_cpu_s": client_cpu_s,
                "events": sum(len(answer.events) for answer in answers),
            },
        )

    def close(self) -> None:
        self._server.stop()


CONTENDERS: dict[str, Callable[[Row], Contender]] = {
    GENERATE: lambda job: Alone(job, streams=False),
    STREAM: lambda job: Alone(job, streams=True),
    HTTP: OverHttp,
}


def measure(contender: Contender, case: Case, job: Row) -> Row:
    """The least disturbed of up to `attempts` samples; one is enough on a quiet machine."""
    prompts = case.prompts(job["seed"], job["vocab_size"])
    contender.run(case.prompts(-1, job["vocab_size"]), WARM_UP)
    best: Row = {}
    for _ in range(job["attempts"]):
        times, found = timed(lambda: contender.run(prompts, case.tokens_out))
        sample = contender.read(found)
        check_lengths([range(count) for count in sample.counts], case)
        if not best or times["others"] < best["others"]:
            first_ms = statistics.median(sample.first_ms)
            best = {**times, **sample.extra, "ttft_ms": first_ms, "texts": sample.texts}
        if best["others"] <= MAX_OTHERS:
            break
    shown = {name: value for name, value in best.items() if name != "texts"}
    print(case.concurrency, shown, file=sys.stderr, flush=True)  # long runs show a pulse
    tokens = case.requests * case.tokens_out
    return {"concurrency": case.concurrency, "tokens": tokens, **best}


def build(job: Row) -> None:
    """A random bf16 checkpoint of the model file, with a tokenizer that has a word for each id."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from dvpa.config import load_model_config
    from dvpa.model import DvpaForCausalLM

    torch.manual_seed(job["seed"])
    config = load_model_config(job["model"])
    DvpaForCausalLM(config).to(torch.bfloat16).save_pretrained(job["checkpoint"])
    special = ("<unk>", "<s>", "</s>", "<pad>")
    words = [*special, *(f"w{number}" for number in range(len(special), config.vocab_size))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(job["checkpoint"])


def work(inputs: Path, output: Path) -> None:
    """Run one job in this process; the result is written when all of it is done."""
    job = json.loads(inputs.read_text())
    os.sched_setaffinity(0, job["cores"])
    if job["contender"] == "build":
        build(job)
        output.write_text("[]")
        return
    contender = CONTENDERS[job["contender"]](job)
    try:
        samples = [measure(contender, Case(**case), job) for case in job["cases"]]
    finally:
        contender.close()
    output.write_text(json.dumps(samples))


class Jobs:
    """Runs jobs, one process each, one at a time."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, model: Row) -> None:
        cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
        cases = [
            Case("throughput", c, c, arguments.input, arguments.output)
            for c in arguments.concurrency
        ]
        self._folder = folder
        self._environment = environment(STREAM, Path(sys.executable), arguments.threads, cores)
        self._common = {
            "model": str(arguments.model),
            "checkpoint": str(folder / "checkpoint"),
            "folder": str(folder),
            "threads": arguments.threads,
            "cores": cores,
            "attempts": arguments.attempts,
            "cases": [asdict(case) for case in cases],
            # The same for all; no prompt is seen twice, but those of other attempts.
            "engine": {"max_num_seqs": max(arguments.concurrency), "prefix_caching": False},
            **model,
        }

    def run(self, contender: str, seed: int) -> list[Row]:
        """The samples of a contender.

        Raises:
            RuntimeError: it failed or took too long; the message is the end of its log.
        """
        inputs, output, log = (self._folder / name for name in ("job.json", "result.json", "log"))
        inputs.write_text(json.dumps({**self._common, "contender": contender, "seed": seed}))
        output.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--job", str(inputs), str(output)]
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command,
                    env=self._environment,
                    stdout=stream,
                    stderr=stream,
                    timeout=JOB_SECONDS,
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        if code != 0 or not output.is_file():
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{contender}: exit code {code}: {lines[-1][:300]}")
        samples: list[Row] = json.loads(output.read_text())
        return samples


def summarise(samples: Sequence[Row]) -> list[Row]:
    """Medians per contender and concurrency.

    `throughput_lost`: share that the server loses against each way of running the engine alone,
    median of the rounds' own shares, with the lowest and highest of them.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for sample in sorted(samples, key=lambda sample: sample["round"]):
        groups.setdefault((sample["concurrency"], sample["contender"]), []).append(sample)
    rows = []
    for (concurrency, contender), group in groups.items():
        row = {
            "concurrency": concurrency,
            "contender": contender,
            "tok_s": statistics.median(s["tokens"] / s["wall_s"] for s in group),
            "each_tok_s": [s["tokens"] / s["wall_s"] for s in group],
            "tok_cpu_s": statistics.median(s["tokens"] / max(s["cpu_s"], TICK_S) for s in group),
            "cpu_ms_per_token": statistics.median(1e3 * s["cpu_s"] / s["tokens"] for s in group),
            "ttft_ms": statistics.median(s["ttft_ms"] for s in group),
            "others": max(s["others"] for s in group),
            "is_disturbed": any(s["others"] > MAX_OTHERS for s in group),
        }
        if contender == HTTP:
            shares = (1e3 * s["client_cpu_s"] / s["tokens"] for s in group)
            row["client_cpu_ms_per_token"] = statistics.median(shares)
            row["throughput_lost"] = {
                alone: lost(group, groups[concurrency, alone])
                for alone in (GENERATE, STREAM)
                if (concurrency, alone) in groups
            }
        rows.append(row)
    order = list(CONTENDERS)
    return sorted(rows, key=lambda row: (row["concurrency"], order.index(row["contender"])))


def lost(server: Sequence[Row], alone: Sequence[Row]) -> Row:
    """Throughput lost, round by round."""
    known = {s["round"]: s for s in alone}
    shares = [1 - known[s["round"]]["wall_s"] / s["wall_s"] for s in server if s["round"] in known]
    return {"median": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}


def same_texts(samples: Sequence[Row]) -> float:
    """Share of requests for which the server sent what `Engine.stream` gave."""
    texts = {
        (s["round"], s["concurrency"]): s["texts"] for s in samples if s["contender"] == STREAM
    }
    pairs = [
        pair
        for s in samples
        if s["contender"] == HTTP and (s["round"], s["concurrency"]) in texts
        for pair in zip(s["texts"], texts[s["round"], s["concurrency"]], strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def main() -> None:
    """Measure and write the JSON; or, with --job, be one of the contenders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "configs/model/bench-500m.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--attempts", type=int, default=3, help="samples until one is undisturbed")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/server.json")
    parser.add_argument("--job", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        work(*arguments.job)
        return
    model, priced, vocab_size = describe_model(arguments.model)
    samples: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(
            arguments, Path(folder), {"vocab_size": vocab_size, "tier": len(priced.tiers) - 1}
        )
        jobs.run("build", seed=0)
        names = list(CONTENDERS)
        for number in range(arguments.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found = jobs.run(name, seed=number)
                samples += [{"contender": name, "round": number, **sample} for sample in found]
                print(f"round {number}: {name} done", file=sys.stderr)
    result = {
        "benchmark": "server",
        **{name: getattr(arguments, name) for name in ("rounds", "threads", "input", "output")},
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
        "model": model,
        "same_texts": same_texts(samples),
        "rows": summarise(samples),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
