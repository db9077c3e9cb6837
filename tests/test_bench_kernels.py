"""The kernel benchmark: its inputs, arithmetic, rows and page. Times are not judged here."""

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
bench_kernels = import_module("bench_kernels")
kernel_cases = import_module("kernel_cases")
kernel_linear = import_module("kernel_linear")
kernel_page = import_module("kernel_page")
kernel_peers = import_module("kernel_peers")
kernel_timing = import_module("kernel_timing")
render_benchmarks = import_module("render_benchmarks")

QUICK = kernel_cases.SHAPES["quick"]
UNIFORM, MIXED = QUICK.mixes


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs_of(mix: Any, tokens: int, dtype: torch.dtype = torch.float32) -> Any:
    weights = kernel_cases.make_weights(QUICK, dtype, "cpu")
    return kernel_cases.make_inputs(QUICK, mix, tokens, weights)


def test_inputs_follow_the_mix() -> None:
    """Distinct experts of the token's pool, as many as its tier says, weights summing to one."""
    inputs = inputs_of(MIXED, 30)
    assert inputs.index.shape == (30, 4)
    for token, (index, weight) in enumerate(zip(inputs.index, inputs.weight, strict=True)):
        k, pool = MIXED.tiers[token % 3]
        chosen = index[index < QUICK.experts].tolist()
        assert len(chosen) == len(set(chosen)) == k
        assert max(chosen) < pool
        assert not weight[index == QUICK.experts].any()
        assert weight.sum() == pytest.approx(1.0, abs=1e-5)


def test_shapes_are_the_models_they_name() -> None:
    shapes = kernel_cases.SHAPES
    sizes = {name: (s.hidden, s.width, s.experts) for name, s in shapes.items()}
    assert sizes["deepseekmoe-16b"] == (2048, 1408, 64)
    assert sizes["qwen3-30b-a3b"] == (2048, 768, 128)
    assert sizes["dvpa-7b-32b"] == (4096, 1024, 256)
    assert [mix.label for mix in shapes["dvpa-7b-32b"].mixes] == [
        "k=4", "k=15", "k=27", "k=48", "mixed 4/15/27/48",
    ]  # fmt: skip
    for shape in shapes.values():
        for k, pool in (tier for mix in shape.mixes for tier in mix.tiers):
            assert k <= pool <= shape.experts


def test_work_counts_touched_weights_and_real_rows() -> None:
    inputs = inputs_of(MIXED, 3, torch.bfloat16)
    index = torch.tensor([[3, 16, 16, 16], [3, 5, 16, 16], [1, 2, 3, 5]])
    inputs = dataclasses.replace(inputs, index=index)
    work = kernel_cases.work_of(inputs, with_backward=False)
    assert work.flops == 7 * 3 * 2 * 256 * 128
    assert work.weight_bytes == 4 * 3 * 256 * 128 * 2
    assert work.all_bytes == work.weight_bytes + 2 * 3 * 256 * 2
    both = kernel_cases.work_of(inputs, with_backward=True)
    assert both.flops == 3 * work.flops
    assert both.weight_bytes == work.weight_bytes
    slow_memory = work.limit_ms(bandwidth_gb_s=1.0, gemm_gflop_s=1e9)
    assert slow_memory == pytest.approx(work.all_bytes / 1e9 * 1e3)
    assert work.limit_ms(1e9, 1.0) == pytest.approx(work.flops / 1e9 * 1e3)


@pytest.mark.parametrize("mix", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_every_peer_computes_the_same(mix: Any) -> None:
    """Also its gradients, so that a forward+backward times the whole of it."""
    expected_leaves = inputs_of(mix, 12).trainable()
    known = kernel_peers.builders("cpu", with_graphs=False)
    expected = known["grouped_mm"](expected_leaves)()
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, expected_leaves.leaves, direction)
    filled = expected_leaves.index < QUICK.experts
    for name in ("transformers_grouped_mm", "transformers_eager", "expert_loop"):
        inputs = inputs_of(mix, 12).trainable()
        try:
            out = known[name](inputs)()
        except RuntimeError as error:  # older Transformers: eager has no empty slots
            assert (name, mix.is_uniform) == ("transformers_eager", False)
            assert "num_classes" in str(error)
            continue
        assert kernel_peers.relative_error(out, expected) < 1e-5, name
        ours = torch.autograd.grad(out, inputs.leaves, direction)
        for place, (one, other) in enumerate(zip(ours, gradients, strict=True)):
            if place == 3:  # weights of empty slots: whatever
                one, other = one[filled], other[filled]
            assert kernel_peers.relative_error(one, other) < 1e-4, (name, place)


def test_liger_says_why_it_is_absent() -> None:
    with pytest.raises(kernel_peers.CannotExpressError, match="needs a CUDA GPU"):
        kernel_peers.builders("cpu", with_graphs=False)["liger"](inputs_of(UNIFORM, 2))


def run_quick(folder: Path, *words: str) -> dict[str, Any]:
    out = folder / "kernels.json"
    arguments = bench_kernels.parse(
        ["--device", "cpu", "--quick", "--seconds-per-case", "0.01", "--out", str(out), *words]
    )
    bench_kernels.run(arguments)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One quick run of everything."""
    return run_quick(tmp_path_factory.mktemp("bench"))


def test_rows_have_the_schema(result: dict[str, Any]) -> None:
    case = {"shape", "tokens", "k", "dtype", "threads", "pass", "implementation"}
    derived = {"ratio_to_grouped_mm", "fraction_of_limit", "gb_s", "tflop_s"}
    for row in result["rows"]:
        assert case | derived <= row.keys()
        assert ("error" in row) != ("median_ms" in row)
        if "median_ms" in row:
            assert 0 < row["p25_ms"] <= row["median_ms"]
            assert row["cpu_ms"] >= 0
            assert row["ratio_to_grouped_mm"] is not None
        else:
            assert row["ratio_to_grouped_mm"] is None
    assert result["measured"]["bandwidth_gb_s"] > 0
    assert result["measured"]["gemm_gflop_s"] > 0
    passes = {row["pass"] for row in result["rows"]}
    assert passes == {"forward", "forward+backward", "model forward"}
    names = {row["implementation"] for row in result["rows"]}
    assert {"dvpa_cpu", "grouped_mm", "transformers_eager", "liger"} <= names


def test_ratios_and_fractions_follow_from_the_times(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["pass"] != "model forward"]
    for row in rows:
        if "median_ms" not in row:
            continue
        same = bench_kernels.case_of(row, "grouped_mm")
        (baseline,) = [other for other in rows if bench_kernels.case_of(other) == same]
        ratio = baseline["median_ms"] / row["median_ms"]
        assert row["ratio_to_grouped_mm"] == pytest.approx(ratio)
        assert row["fraction_of_limit"] == pytest.approx(row["limit_ms"] / row["p25_ms"])


def test_our_experts_run_inside_a_transformers_model(result: dict[str, Any]) -> None:
    rows = {r["implementation"]: r for r in result["rows"] if r["pass"] == "model forward"}
    assert set(rows) == {"dvpa_in_transformers", "transformers_grouped_mm", "transformers_eager"}
    assert not any("error" in row for row in rows.values()), rows


def test_a_failing_contender_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = kernel_peers.builders("cpu", with_graphs=False)

    def absent(inputs: Any) -> Callable[[], torch.Tensor]:
        raise ImportError("No module named 'dvpa_kernels.cpu'")

    def off(inputs: Any) -> Callable[[], torch.Tensor]:
        return lambda: known["grouped_mm"](inputs)() * 1.5

    calls = []

    def late(inputs: Any) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            calls.append(1)
            if len(calls) > 3:  # in the second counted round, which even slow ones have
                raise RuntimeError("gone\nsecond line")
            return known["grouped_mm"](inputs)()

        return call

    broken = {"dvpa_cpu": absent, "grouped_mm": known["grouped_mm"], "liger": off, "late": late}
    monkeypatch.setattr(bench_kernels, "builders", lambda device, with_graphs: broken)
    words = ["--skip", "linear", "model", "--tokens", "4", "--passes", "forward"]
    rows = run_quick(tmp_path, *words)["rows"]
    reasons = {row["implementation"]: row.get("error") for row in rows if row["k"] == "k=4"}
    assert reasons["dvpa_cpu"] == "ImportError: No module named 'dvpa_kernels.cpu'"
    assert reasons["grouped_mm"] is None
    assert reasons["liger"] == "wrong result: relative error 5.0e-01"
    assert reasons["late"] == "RuntimeError: gone"


def test_interleaving_visits_everyone_and_stops_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    # A clock that runs out of the budget, two seconds, while the least number of rounds is on.
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr(kernel_timing.time, "perf_counter", lambda: next(now))
    clock = kernel_timing.Clock("cpu")
    monkeypatch.setattr(clock, "measure", lambda call: (call(), (1.0, 1.0))[1])
    samples = kernel_timing.interleave(calls, clock, 2.0, flush=False)
    rounds = order[3 * kernel_timing.WARM_UP :]
    assert [set(rounds[i : i + 3]) for i in range(0, len(rounds), 3)] == (
        [{"a", "b", "c"}] * kernel_timing.MIN_ROUNDS
    )
    assert len(set(rounds[::3])) == 3  # not always the same one first
    assert all(len(found.wall_ms) == kernel_timing.MIN_ROUNDS for found in samples.values())


def test_summary_is_the_median_and_the_lower_quartile() -> None:
    row = kernel_timing.Samples([4.0, 1.0, 3.0, 2.0, 50.0], [1.0, 2.0, 9.0, 1.0, 1.0]).row()
    assert row == {"median_ms": 3.0, "p25_ms": 2.0, "cpu_ms": 1.0, "rounds": 5}


def test_a_contender_that_would_use_up_the_budget_leaves_early() -> None:
    calls = {"slow": lambda: time.sleep(0.02), "quick": lambda: None}
    samples = kernel_timing.interleave(calls, kernel_timing.Clock("cpu"), 0.05, flush=False)
    assert samples["slow"].row()["rounds"] == kernel_timing.SLOW_ROUNDS
    assert samples["quick"].row()["rounds"] >= kernel_timing.MIN_ROUNDS


def test_line_fit() -> None:
    def points(mixed_ms: float) -> list[dict[str, Any]]:
        line = [{"mean_k": k, "is_uniform": True, "median_ms": 3 + 2 * k} for k in (1.0, 2.0, 8.0)]
        return [*line, {"mean_k": 4.0, "is_uniform": False, "median_ms": mixed_ms}]

    fit = kernel_linear.line_fit(points(11.0))
    assert fit is not None
    assert (fit["slope_ms_per_k"], fit["intercept_ms"]) == pytest.approx((2.0, 3.0))
    assert fit["r2"] == pytest.approx(1.0)
    assert fit["mixed_off_uniform_line"] == pytest.approx(0.0, abs=1e-9)
    bent = kernel_linear.line_fit(points(22.0))
    assert bent is not None
    assert bent["mixed_off_uniform_line"] == pytest.approx(1.0)
    assert bent["r2"] < 0.9
    assert kernel_linear.line_fit([{"error": "x"}] * 5) is None


def test_linear_cost_changes_only_the_rows() -> None:
    mixes = kernel_linear.mixes_of([1, 2, 4, 8], 16)
    assert [mix.label for mix in mixes] == [
        "k=1", "k=2", "k=4", "k=8", "mixed 1/4", "mixed 2/8", "mixed 1/8",
    ]  # fmt: skip
    assert {pool for mix in mixes for _, pool in mix.tiers} == {16}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--only", "nobody"], "not one of dvpa_cpu"),
        (["--shapes", "nothing"], "invalid choice"),
        (["--device", "cuda"], "sees no CUDA GPU"),
    ],
)
def test_bad_arguments_are_named(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        bench_kernels.parse(["--device", "cpu", *words])
    assert reason in capsys.readouterr().err


def test_the_page_shows_times_reasons_and_the_figure(result: dict[str, Any]) -> None:
    page = render_benchmarks.render_kernels(result)
    assert "## The expert kernels on a CPU" in page
    assert "liger: CannotExpressError: needs a CUDA GPU (" in page
    assert f"![Time against mean k](benchmarks/{kernel_page.FIGURE})" in page
    row = next(row for row in result["rows"] if row["implementation"] == "grouped_mm")
    assert f"{row['median_ms']:.3g} (" in page or f"{row['median_ms']:,.0f} (" in page
    widths = {}
    for block in page.split("\n\n"):
        if block.startswith("| "):
            widths[block] = {line.count(" |") for line in block.splitlines()}
    assert len(widths) == 4
    assert all(len(counts) == 1 for counts in widths.values())
    png = kernel_page.linear_png([result])
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert kernel_page.linear_png([{"linear_cost": {}}]) is None


def test_json_holds_no_nan() -> None:
    value = {"a": [1.0, math.nan, math.inf], "b": {"c": -math.inf, "d": 2}}
    assert bench_kernels.finite(value) == {"a": [1.0, None, None], "b": {"c": None, "d": 2}}
