"""The engine benchmark: its cases, arithmetic and processes. Times are not judged here."""

import argparse
import json
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
bench_engine = import_module("bench_engine")
engine_peers = import_module("engine_peers")

PICO = ROOT / "configs" / "model" / "pico.yaml"
BENCH = ROOT / "configs" / "model" / "bench-500m.yaml"


def arguments_of(**changed: Any) -> argparse.Namespace:
    values = {
        "model": PICO,
        "threads": 1,
        "attempts": 1,
        "rounds": 1,
        "input": 8,
        "output": 4,
        "concurrency": [1, 2],
        "mixed": [2],
        "batches": [1, 2],
        "contexts": [16, 8, 32],
        "context_batches": [1],
        "only": ["transformers", "dvpa generate", "vllm"],
        "vllm_python": None,
    }
    return argparse.Namespace(**{**values, **changed})


def sample(case: str, concurrency: int, wall: float, **more: Any) -> dict[str, Any]:
    row = {"contender": "dvpa", "round": 0, "case": case, "concurrency": concurrency}
    return {**row, "wall_s": wall, "cpu_s": 2 * wall, "tokens": 100, "others": 0.0, **more}


def test_model_is_the_one_the_issue_names() -> None:
    model, priced, vocab_size = bench_engine.describe_model(BENCH)
    config = load_model_config(BENCH)
    assert vocab_size == 32000
    assert priced.total_params == pytest.approx(500e6, rel=0.05)
    assert (config.num_hidden_layers, config.hidden_size, config.n_shared_experts) == (12, 768, 2)
    top = config.tiers[-1]
    assert (config.n_routed_experts, config.moe_intermediate_size, top.top_k) == (64, 256, 8)
    # Top-8 of 64 without a limit to groups, and what is read adds up to what is stored.
    assert top.topk_group == top.num_groups == config.n_group
    embedding = 2 * config.vocab_size * config.hidden_size
    stored = model["other_bytes"] + 64 * model["expert_bytes"] + embedding
    assert stored == 2 * priced.tiers[-1].tier_params


def test_prompts_are_reproducible_and_shorter_ones_begin_longer_ones() -> None:
    short = engine_peers.Case("context", 2, 2, 8, 4).prompts(1, 100)
    long = engine_peers.Case("context", 2, 2, 32, 4).prompts(1, 100)
    assert [prompt[:8] for prompt in long] == short
    assert short[0] != short[1]
    assert short != engine_peers.Case("context", 2, 2, 8, 4).prompts(2, 100)
    assert all(3 <= token < 100 for prompt in long for token in prompt)


def test_cases_of_a_round() -> None:
    arguments = arguments_of()
    first = bench_engine.make_cases(arguments, "dvpa", 0)
    later = bench_engine.make_cases(arguments, "dvpa", 1)
    kinds = Counter(case.name for case in first)
    assert kinds == {"throughput": 2, "top": 1, "mixed": 1, "batch": 2, "context": 3}
    assert [case.tokens_in for case in first if case.name == "context"] == [8, 16, 32]
    # Neither the mix nor all-top always comes first.
    assert [case.name for case in first[2:4]] == ["top", "mixed"]
    assert [case.name for case in later[2:]] == ["mixed", "top"]
    assert {case.requests for case in first[2:4]} == {8}
    assert {case.name for case in bench_engine.make_cases(arguments, "vllm", 0)} == {"throughput"}


def test_mix_is_seventy_twenty_ten() -> None:
    assert Counter(bench_engine.MIX) == {"base": 7, "middle": 2, "top": 1}


def test_throughput_is_the_median_and_says_when_it_was_disturbed() -> None:
    samples = [sample("throughput", 8, wall) for wall in (1.0, 2.0, 4.0)]
    samples[2]["others"] = 0.5
    (row,) = bench_engine.throughput_rows(samples)
    assert (row["tok_s"], row["tok_cpu_s"]) == (50.0, 25.0)
    assert row["is_disturbed"] and row["others"] == 0.5
    (row,) = bench_engine.throughput_rows(samples[:2])
    assert not row["is_disturbed"]


def test_realised_saving_is_one_when_time_falls_with_parameters() -> None:
    priced = price(load_model_config(BENCH))
    base, middle, top = (tier.activated_params for tier in priced.tiers)
    # 4 x 10 requests: exactly 70 / 20 / 10 per cent.
    ratio = (0.7 * base + 0.2 * middle + 0.1 * top) / top
    samples = [sample("top", 10, 2.0), sample("mixed", 10, 2.0 * ratio)]
    (row,) = bench_engine.mixed_rows(bench_engine.throughput_rows(samples), priced)
    assert row["activated_ratio"] == pytest.approx(ratio)
    assert row["saving_realised"] == pytest.approx(1.0)
    assert row["throughput_ratio"] == pytest.approx(1 / ratio)
    samples[1]["wall_s"] = 2.0
    (row,) = bench_engine.mixed_rows(bench_engine.throughput_rows(samples), priced)
    assert row["saving_realised"] == pytest.approx(0.0)


def test_agreement_counts_first_tokens_of_the_same_prompts() -> None:
    rows = [
        sample("throughput", 2, 1.0, contender="transformers", outputs=[[1, 2], [3, 4]]),
        sample("throughput", 2, 1.0, outputs=[[1, 9], [5, 4]]),
        sample("top", 2, 1.0, outputs=[[7], [7]]),
    ]
    assert bench_engine.agreement(rows) == {"transformers": 1.0, "dvpa": 0.5}
    assert bench_engine.agreement(rows[1:]) == {}


def test_limit_counts_weights_once_and_the_cache_of_every_request() -> None:
    model = {"other_bytes": 600, "expert_bytes": 10, "kv_bytes_per_token": 2}
    rows = [
        {"case": "throughput", "concurrency": 4, "experts_touched": 30.0},
        {"case": "batch", "concurrency": 4, "context": 100.0, "step_ms": 0.017},
        {"case": "batch", "concurrency": 8, "context": 100.0, "step_ms": 0.017},
    ]
    (row,) = bench_engine.limit_rows(rows, model, 1e-1)
    assert row["bytes"] == 600 + 300 + 4 * 100 * 2
    assert row["limit_ms"] == pytest.approx(0.017)
    assert row["fraction"] == pytest.approx(1.0)


def test_context_line_tells_linear_growth_from_faster() -> None:
    def rows(power: int) -> list[dict[str, Any]]:
        contexts = (1000, 2000, 4000, 8000)
        times = {c: 5 + (c / 1000) ** power for c in contexts}
        return [
            {"case": "context", "concurrency": 8, "context": c, "step_ms": times[c]}
            for c in contexts
        ]

    model = {"kv_bytes_per_token": 1000}
    (line,) = bench_engine.context_lines(rows(1), model, 1.0)
    assert line["ms_per_1k"] == pytest.approx(1.0)
    assert line["intercept_ms"] == pytest.approx(5.0)
    assert line["cache_ms_per_1k"] == pytest.approx(8.0)  # 8 x 1000 x 1000 bytes at 1 GB/s
    assert line["last_slope_ratio"] == pytest.approx(1.0)
    (line,) = bench_engine.context_lines(rows(2), model, 1.0)
    assert line["last_slope_ratio"] > 1.2
    assert bench_engine.context_lines(rows(1)[:2], model, 1.0) == []


def test_short_outputs_are_refused() -> None:
    case = engine_peers.Case("throughput", 2, 2, 8, 4)
    engine_peers.check_lengths([[1, 2, 3, 4]] * 2, case)
    with pytest.raises(RuntimeError, match="throughput"):
        engine_peers.check_lengths([[1, 2, 3, 4], [1]], case)


def test_cpu_time_of_the_tree_counts_and_idling_does_not() -> None:
    def burn() -> str:
        start = time.process_time()
        while time.process_time() - start < 0.3:
            pass
        return "done"

    times, result = engine_peers.timed(burn)
    assert result == "done"
    assert times["cpu_s"] == pytest.approx(0.3, abs=0.1)
    assert 0.0 <= times["others"] <= 1.0
    assert engine_peers.timed(lambda: time.sleep(0.3))[0]["cpu_s"] < 0.1


def test_measure_keeps_the_least_disturbed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.6, 0.2, 0.4, 0.9])

    class Fixed:
        def complete(self, prompts: Any, case: Any, tokens_out: int) -> Any:
            return [[1] * tokens_out for _ in prompts]

    def timed(call: Any) -> Any:
        return {"wall_s": 1.0, "cpu_s": 1.0, "others": next(others)}, call()

    monkeypatch.setattr(engine_peers, "timed", timed)
    case = engine_peers.Case("throughput", 2, 2, 8, 4)
    found = engine_peers.measure(Fixed(), case, {"seed": 0, "vocab_size": 99, "attempts": 3})
    assert found["others"] == 0.2
    assert found["tokens"] == 8


def test_experts_touched_are_counted_by_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = load_model_config(PICO)
    DvpaForCausalLM(config).save_pretrained(tmp_path)
    contender = engine_peers.Generate({"checkpoint": str(tmp_path)}, is_ours=True)
    prompt = engine_peers.Case("throughput", 1, 1, 8, 4).prompts(0, config.vocab_size)[0]
    top_k = config.tiers[-1].top_k
    # Equal sequences touch what one of them does.
    assert contender.experts_touched([prompt] * 3, 4) == top_k
    others = engine_peers.Case("throughput", 8, 8, 8, 4).prompts(1, config.vocab_size)
    touched = contender.experts_touched(others, 4)
    assert top_k < touched <= min(8 * top_k, config.n_routed_experts)


def test_failed_job_tells_the_end_of_its_log(tmp_path: Path) -> None:
    workers = bench_engine.Workers(arguments_of(), tmp_path, 99)
    with pytest.raises(RuntimeError, match=r"exit code 1.*nowhere"):
        workers.run("build", seed=0, model="nowhere.yaml")


def test_vllm_runs_apart_from_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    found = bench_engine.environment("vllm", tmp_path / "bin" / "python", 2, [0, 1])
    assert "PYTHONPATH" not in found
    assert found["LD_PRELOAD"].endswith("libiomp5.so")
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "0,1")
    ours = bench_engine.environment("dvpa", tmp_path / "bin" / "python", 2, [0, 1])
    assert str(ROOT) in ours["PYTHONPATH"]


@pytest.mark.slow
def test_whole_run_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes, without vLLM: said so, and the peers compute the same model."""
    out = tmp_path / "engine.json"
    command = "bench_engine.py --rounds 1 --threads 1 --attempts 1 --concurrency 1 2 --input 8"
    command += f" --output 4 --only transformers vllm --model {PICO} --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    bench_engine.main()
    result = json.loads(out.read_text())
    assert {row["contender"] for row in result["throughput"]} == {"transformers"}
    assert result["left_out"] == {"vllm": "no --vllm-python"}
    assert result["measured"]["bandwidth_gb_s"] > 0
