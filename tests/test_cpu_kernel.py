"""The C++ expert kernel: every instruction set of this machine against the oracle, and its build.

Letters: T tokens, D hidden, F expert width, E experts, K slots.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa_kernels import RowRouting, make_routing, moe_mlp
from dvpa_kernels.cpu import build, library, moe_mlp_cpu, op, status
from dvpa_kernels.cpu.build import COMPILE_FLAGS, MAIN_SOURCE, find_compiler, loaded_openmp
from dvpa_kernels.cpu.library import sort_rows_cpu
from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import sort_rows
from dvpa_kernels.torch_grouped import moe_mlp_torch

REPOSITORY = Path(__file__).resolve().parent.parent
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
Operands = tuple[Tensor, Tensor, Tensor, RowRouting]

needs_kernel = pytest.mark.skipif(status().isa is None, reason=f"no kernel: {status().reason}")


def isa_parameters() -> list[Any]:
    """Every instruction set, with the reason where this machine lacks it."""
    lacking = "this processor does not have {}" if status().isa else "the kernel is not built"
    return [
        pytest.param(isa, marks=() if isa in status().isas else pytest.mark.skip(
            reason=lacking.format(isa)))
        for isa in library.ISAS
    ]  # fmt: skip


ISA = pytest.mark.parametrize("isa", isa_parameters())


def random_index(tokens: int, experts: int, slots: int, seed: int) -> Tensor:
    """[T, K]: each token's own number of distinct experts, down to none; the rest is empty."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).argsort(1)[:, :slots]
    counts = torch.randint(0, slots + 1, (tokens, 1), generator=g)
    return index.masked_fill(torch.arange(slots) >= counts, experts)


def operands(
    index: Tensor, experts: int, hidden: int, width: int, dtype: torch.dtype, seed: int = 0
) -> Operands:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(index), hidden, generator=g)
    w_gate_up = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    w_down = torch.randn(experts, hidden, width, generator=g) / width**0.5
    routing = make_routing(index, torch.rand(index.shape, generator=g) + 0.1, experts)
    return x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), routing


def assert_near_oracle(out: Tensor, inputs: Operands) -> None:
    """Relative Frobenius error against the oracle in fp64, which rounds nothing."""
    x, w_gate_up, w_down, routing = inputs
    exact = moe_mlp_reference(x.double(), w_gate_up.double(), w_down.double(), routing)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    assert (out.double() - exact).norm() <= BOUNDS[x.dtype] * exact.norm()


def in_process(
    program: str, cache: Path, set_up_logs: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process with its own kernel cache; log lines go to stderr."""
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "train", "kernels"))
    variables = {**os.environ, "PYTHONPATH": path, "DVPA_CACHE": str(cache), **environment}
    if set_up_logs:
        program = "import logging; logging.basicConfig(level='INFO')\n" + program
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


TINY_CALL = """
import torch
from dvpa_kernels import make_routing, moe_mlp
from dvpa_kernels.cpu import status
torch.manual_seed(0)
routing = make_routing(torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2), 3)
inputs = torch.randn(2, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8), routing
with torch.no_grad():
    for _ in range(2):
        ours = moe_mlp(*inputs, backend="cpu")
torch.testing.assert_close(ours, moe_mlp(*inputs, backend="reference"), rtol=1e-4, atol=1e-4)
print(status().isa)
"""


@ISA
@DTYPE
@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "hidden", "width"),
    [
        (9, 6, 3, 64, 32),
        (1, 8, 8, 128, 96),
        (1, 3, 1, 7, 5),  # below every vector length
        (13, 5, 5, 65, 33),  # one past it
        (21, 4, 3, 47, 100),
        (3, 50, 48, 40, 24),
        (70, 2, 1, 300, 16),  # many rows for each expert, and more than one block of the sum
    ],
)
def test_output(
    tokens: int, experts: int, slots: int, hidden: int, width: int, dtype: torch.dtype, isa: str
) -> None:
    index = random_index(tokens, experts, slots, seed=tokens)
    index[0] = torch.arange(slots)  # never a batch without rows
    inputs = operands(index, experts, hidden, width, dtype)
    assert_near_oracle(moe_mlp_cpu(*inputs, isa=isa), inputs)


@ISA
@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 12])
def test_all_rows_on_one_expert(rows: int, dtype: torch.dtype, isa: str) -> None:
    """Every row tile; the other experts' weights are never read."""
    inputs = operands(torch.full((rows, 1), 2), 4, 48, 40, dtype)
    inputs[1][[0, 1, 3]] = float("nan")
    out = moe_mlp_cpu(*inputs, isa=isa)
    inputs[1][[0, 1, 3]] = 0.0
    assert_near_oracle(out, inputs)


@ISA
@DTYPE
def test_tokens_without_rows_are_zero(dtype: torch.dtype, isa: str) -> None:
    index = torch.tensor([[4, 4], [4, 1], [4, 4]])
    out = moe_mlp_cpu(*operands(index, 4, 24, 8, dtype), isa=isa)
    assert out[1].any()
    assert not out[[0, 2]].any()
    assert not moe_mlp_cpu(*operands(index.fill_(4), 4, 24, 8, dtype), isa=isa).any()
    assert moe_mlp_cpu(*operands(index[:0], 4, 24, 8, dtype), isa=isa).shape == (0, 24)


@ISA
@DTYPE
def test_large_and_special_values(dtype: torch.dtype, isa: str) -> None:
    """silu saturates without overflow; NaN comes through; fp16 rounds to subnormals."""
    routing = make_routing(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), 1)
    gate_up = torch.tensor([[[1.0], [0.001]]], dtype=dtype)
    x = torch.tensor([[1e4], [-1e4], [float("nan")]], dtype=dtype)
    out = moe_mlp_cpu(x, gate_up, torch.ones(1, 1, 1, dtype=dtype), routing, isa=isa)
    huge = x[:1].double() * x[:1].double() * gate_up[0, 1].double()
    expected = huge.to(dtype)  # infinite in fp16
    torch.testing.assert_close(out[:1], expected, rtol=1e-2, atol=0)
    assert abs(out[1].item()) < 1e-30
    assert out[2].isnan()
    small = torch.full((1, 1, 1), 1e-5, dtype=dtype)
    one = make_routing(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 1e-2), 1)
    inputs = (torch.ones(1, 1, dtype=dtype), torch.ones(1, 2, 1, dtype=dtype), small, one)
    exact = moe_mlp_reference(*(value.double() for value in inputs[:3]), one).to(dtype)
    torch.testing.assert_close(moe_mlp_cpu(*inputs, isa=isa), exact, rtol=1e-2, atol=6e-8)


@ISA
@settings(max_examples=40)
@given(data=st.data())
def test_any_routing(isa: str, data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 9))
    slots = data.draw(st.integers(1, experts))
    hidden, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 1000))
    dtype = data.draw(st.sampled_from(list(BOUNDS)))
    inputs = operands(random_index(tokens, experts, slots, seed), experts, hidden, width, dtype)
    out = moe_mlp_cpu(*inputs, isa=isa)
    if dtype == torch.float32 or hidden * width * tokens > 1000:  # few numbers: no mean error
        assert_near_oracle(out, inputs)
    assert out.isfinite().all()


@ISA
@DTYPE
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(
    dtype: torch.dtype, isa: str
) -> None:
    index = random_index(30, 6, 6, seed=1)
    x, w_gate_up, w_down, routing = inputs = operands(index, 6, 160, 96, dtype)
    one = library.run_kernel(*inputs, isa=isa, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(library.run_kernel(*inputs, isa=isa, threads=threads), one)
    for token in range(0, 30, 7):
        weight = torch.zeros(index.shape)
        rows = routing.token_rows[routing.token_offsets[token] : routing.token_offsets[token + 1]]
        weight[token, : len(rows)] = routing.weight[rows]
        alone = make_routing(index[token : token + 1], weight[token : token + 1], 6)
        out = moe_mlp_cpu(x[token : token + 1], w_gate_up, w_down, alone, isa=isa)
        assert torch.equal(out[0], one[token])


@needs_kernel
def test_slices_views_and_half_weights_are_read_right() -> None:
    _, w_gate_up, w_down, _ = operands(random_index(8, 6, 3, 5), 6, 32, 16, torch.float16)
    wide = torch.randn(8, 64).half()
    index = random_index(8, 3, 2, 6)
    routing = make_routing(index, torch.rand(index.shape).half(), 3)
    inputs = (wide[:, ::2], w_gate_up[2:5], w_down[2:5], routing)
    assert_near_oracle(moe_mlp(*inputs, backend="cpu"), inputs)


@needs_kernel
def test_the_kernel_runs_by_default_and_large_batches_are_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(op, "moe_mlp_torch", lambda *given: calls.append(given) or given[0])
    inputs = operands(random_index(6, 4, 4, 0), 4, 32, 16, torch.float32)
    limit = op.max_rows_per_expert(str(status().isa), torch.float32)
    moe_mlp_cpu(*inputs)
    assert not calls
    for rows, handed_over in ((limit, 0), (limit + 1, 1)):  # all of them on one expert of four
        moe_mlp_cpu(*operands(torch.ones(rows, 1, dtype=torch.long), 4, 32, 16, torch.float32))
        assert len(calls) == handed_over


@DTYPE
def test_gradients_are_those_of_the_torch_backend(dtype: torch.dtype) -> None:
    x, w_gate_up, w_down, routing = operands(random_index(9, 5, 3, 2), 5, 32, 16, dtype)
    grads = {}
    for backend in ("cpu", "torch"):
        leaves = [value.clone().requires_grad_() for value in (x, w_gate_up, w_down)]
        weight = routing.weight.clone().requires_grad_()
        columns = {**vars(routing), "weight": weight}
        moe_mlp(*leaves, RowRouting(**columns), backend=backend).sum().backward()  # an expanded one
        grads[backend] = [leaf.grad for leaf in (*leaves, weight)]
    for name, ours, theirs in zip(
        ("x", "w_gate_up", "w_down", "weight"), grads["cpu"], grads["torch"], strict=True
    ):
        assert ours.any(), name
        assert torch.equal(ours, theirs), name


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [1, 3])
def test_it_is_one_operator_in_a_compiled_graph(slots: int, dtype: torch.dtype) -> None:
    index = random_index(7, 5, slots, 3)
    x, w_gate_up, w_down, _ = operands(index, 5, 40, 24, dtype)
    weight = torch.rand(index.shape)
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    def layer(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return moe_mlp(x, w_gate_up, w_down, make_routing(index, weight, 5), backend="cpu") * 2

    with torch.no_grad():
        out = torch.compile(layer, fullgraph=True, backend=keep)(x, index, weight)
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, index, weight)
        eager = layer(x, index, weight)
    assert sum("cpu_moe_mlp" in str(node.target) for node in graphs[0].graph.nodes) == 1
    assert torch.equal(out, eager)
    assert torch.equal(traced, eager)


@needs_kernel
def test_the_operator_is_registered_soundly() -> None:
    x, w_gate_up, w_down, r = operands(random_index(4, 3, 2, 1), 3, 16, 8, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.cpu_moe_mlp, (x, w_gate_up, w_down, *r.columns), test_utils=checks)


def test_compiled_gradients_go_through_the_torch_backend() -> None:
    index = random_index(6, 4, 2, 4)
    # bf16: F.grouped_mm cannot be traced in fp32 (torch 2.13)
    x, w_gate_up, w_down, _ = operands(index, 4, 16, 8, torch.bfloat16)

    def loss(x: Tensor) -> Tensor:
        routing = make_routing(index, torch.ones(index.shape), 4)
        return moe_mlp(x, w_gate_up, w_down, routing, backend="cpu").sum()

    expected, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(ours).backward()
    torch.testing.assert_close(ours.grad, expected.grad)


def test_fp64_and_other_devices() -> None:
    inputs = operands(random_index(4, 3, 2, 1), 3, 16, 8, torch.float64)
    assert torch.equal(moe_mlp_cpu(*inputs), moe_mlp_torch(*inputs))
    with pytest.raises(RuntimeError, match="backend 'cpu': x is on meta"):
        moe_mlp_cpu(inputs[0].to("meta"), *inputs[1:])
    with pytest.raises(ValueError, match="isa: 'sse9' must be one of"):
        moe_mlp_cpu(*(value.float() for value in inputs[:3]), inputs[3], isa="sse9")


@needs_kernel
def test_the_library_brings_no_second_openmp() -> None:
    if not status().shares_openmp:
        pytest.skip("PyTorch has loaded no OpenMP runtime")
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {os.path.realpath(line.split()[-1]) for line in lines if re.search("lib.omp", line)}
    assert os.path.realpath(str(loaded_openmp())) in runtimes
    needed = subprocess.run(
        ["readelf", "-d", str(status().library)], capture_output=True, text=True, check=False
    )
    assert not re.search("NEEDED.*(omp|stdc)", needed.stdout)


@needs_kernel
def test_the_bf16_dot_product_is_in_the_library() -> None:
    if os.uname().machine != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump on x86_64")
    command = ["objdump", "-d", "--no-show-raw-insn", str(status().library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count("vdpbf16ps") > 50


def test_without_a_compiler_grouped_mm_does_it_and_says_so(tmp_path: Path) -> None:
    done = in_process(TINY_CALL, tmp_path, PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "no C++ compiler found" in warnings[0]
    assert "F.grouped_mm" in warnings[0]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-c++", "CXX=no-such-c++: no such compiler"), ("false", "failed with status 1")],
)
def test_a_failing_build_names_its_reason(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("DVPA_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", None)
    inputs = operands(random_index(4, 3, 2, 1), 3, 16, 8, torch.float32)
    with caplog.at_level(logging.WARNING):
        out = [moe_mlp_cpu(*inputs) for _ in range(3)]
    assert torch.equal(out[0], moe_mlp_torch(*inputs))
    failures = [text for text in caplog.messages if "no CPU expert kernel" in text]
    assert len(failures) == 1
    assert reason in failures[0]
    assert library.status().isa is None
    assert reason in str(library.status().reason)
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real compiler without its optimiser, for tests of the build itself."""
    if status().isa is None:
        pytest.skip("no compiler")
    wrapper = tmp_path_factory.mktemp("compiler") / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {find_compiler()[0]} "$@" -O0\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def test_one_build_serves_every_process(
    tmp_path: Path, quick_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two race for it and both get it; a process after them finds it; a broken file is mended."""
    monkeypatch.setenv("CXX", quick_compiler)
    monkeypatch.setenv("DVPA_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(build.build, False) for _ in range(2)]
    assert paths[0].result() == paths[1].result()
    (built,) = tmp_path.iterdir()  # the one library, and nothing left of either build
    before = built.stat().st_mtime_ns
    later = in_process(TINY_CALL, tmp_path)
    assert later.returncode == 0, later.stderr
    assert later.stdout == f"{status().isa}\n"
    assert "building" not in later.stderr
    assert built.stat().st_mtime_ns == before
    built.write_bytes(b"not a library")
    monkeypatch.setattr(library, "_loaded", None)
    assert library.status().isas
    assert built.stat().st_size > 10_000


def test_the_build_is_announced_where_nobody_set_up_logs(
    tmp_path: Path, quick_compiler: str
) -> None:
    done = in_process(TINY_CALL, tmp_path, set_up_logs=False, CXX=quick_compiler)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "building the CPU expert kernel with c++ (a few seconds, once)"
    ]


def test_a_cache_that_cannot_be_written(tmp_path: Path, quick_compiler: str) -> None:
    """The library then lives in a private folder that is gone once it is loaded."""
    blocked, scratch = tmp_path / "file", tmp_path / "scratch"
    blocked.write_text("")
    scratch.mkdir()
    done = in_process(TINY_CALL, blocked / "cache", CXX=quick_compiler, TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{status().isa}\n"
    assert "cannot be written" in done.stderr
    assert not list(scratch.iterdir())


def test_the_flags_ask_for_no_inexact_mathematics() -> None:
    assert not {"-ffast-math", "-Ofast", "-march=native"} & set(COMPILE_FLAGS)
    assert MAIN_SOURCE.is_file()


@needs_kernel
@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 7), st.integers(0, 10_000))
def test_the_counting_sort_is_the_portable_one(
    tokens: int, slots: int, experts: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts + 1, (tokens, slots), generator=g)
    order, expert_offsets, token_rows, token_offsets = sort_rows(index, experts)
    rows = int(expert_offsets[-1])
    found = sort_rows_cpu(index.to(torch.int32) if seed % 2 else index, experts)
    assert found is not None
    expected = (
        order[:rows],
        order[:rows] // max(slots, 1),
        expert_offsets,
        token_rows[:rows],
        token_offsets,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
