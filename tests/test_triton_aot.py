"""Ahead-of-time compilation: what the launchers would run, compiled without a GPU.

The launchers run on tensors without storage, their launches are recorded, and each is compiled with
exactly its types and constants: for Hopper (wgmma where tiles have 64 rows or more, TMA) and for
older GPUs (which have less shared memory). Registers must not spill: that shows in the stack, which
`cuobjdump` counts apart from declared local memory.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvpa_kernels import RowRouting

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaced the kernels", allow_module_level=True)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that its default will change

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dvpa_kernels import fp8, fp8_gemm, gather_sum, grouped_gemm, grouped_gemm_backward, tiles
from dvpa_kernels.triton_moe import backward_rows, forward_rows
from dvpa_kernels.tuning import default_plan, find_plan, fit_plan, shared_bytes

KERNELS = {
    "up_kernel": grouped_gemm,
    "matmul_kernel": grouped_gemm,
    "activation_gradient_kernel": grouped_gemm_backward,
    "weight_gradient_kernel": grouped_gemm_backward,
    "tiles_kernel": tiles,
    "gather_sum_kernel": gather_sum,
    "quantise_kernel": fp8_gemm,
    "fp8_up_kernel": fp8_gemm,
    "fp8_down_kernel": fp8_gemm,
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Shared memory of a thread block: H100; A100; the smallest that has bf16 (consumer Ampere, Ada).
HOPPER, AMPERE, CONSUMER = (90, 232448), (80, 166912), (89, 101376)
Launched = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Every launch from here on, recorded and not run; the GPU is said to have TMA."""
    recorded: list[Launched] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(0 < size < 2**31 for size in grid), (self.name, grid)
            return lambda *args, **kwargs: recorded.append((self.name, args, kwargs))

    for module in (grouped_gemm, fp8_gemm):
        monkeypatch.setattr(module, "is_interpreted", lambda: False)
    monkeypatch.setattr(grouped_gemm, "has_tma", lambda matrix: True)
    for name, module in KERNELS.items():
        kernel = getattr(module, name)
        ORIGINALS[name] = kernel
        monkeypatch.setattr(module, name, Recorder(name))
    yield recorded


ORIGINALS: dict[str, Any] = {}


def type_of(argument: object) -> str:
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{TYPES[argument.base.dtype]}{list(argument.block_shape)}>"
    return "*" + TYPES[argument.dtype] if isinstance(argument, Tensor) else "i32"


def compiled(launch: Launched, arch: int) -> dict[str, Any]:
    """Compile one recorded launch; what the assembler says about it."""
    name, arguments, keywords = launch
    kernel, keywords = ORIGINALS[name], dict(keywords)
    options = {key: keywords.pop(key) for key in ("num_warps", "num_stages") if key in keywords}
    types = dict(zip(kernel.arg_names, map(type_of, arguments), strict=False))
    signature = {n: "constexpr" if n in keywords else types[n] for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=keywords,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {
        word.lower(): int(re.search(rf"\b{word}:(\d+)", said)[1])
        for word in ("REG", "LOCAL", "STACK")
    }
    ptx = built.asm["ptx"]
    return {
        "kernel": name,
        "types": list(types.values()),
        **options,
        **{key: value for key, value in keywords.items() if key.isupper()},
        **numbers,
        "shared": built.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
        "tma": len(re.findall(r"\bcp\.async\.bulk\.tensor\b", ptx)),
    }


def check(launches: list[Launched], gpu: tuple[int, int], dtype: torch.dtype) -> set[str]:
    """Compile the launches, each kind once; the names of their kernels."""
    arch, limit = gpu
    seen: dict[str, Launched] = {}
    for launch in launches:
        name, arguments, keywords = launch
        seen.setdefault(str((name, [type_of(a) for a in arguments], keywords)), launch)
    for launch in seen.values():
        result = compiled(launch, arch)
        print(result)  # registers and the rest, shown when something fails
        assert result["local"] == 0 and result["stack"] == 0, result
        assert result["shared"] <= limit, result
        multiplies = ("BM" in result and launch[0] != "tiles_kernel") or "BI" in result
        if not multiplies or dtype == torch.float32:
            continue
        if arch == 90 and result.get("BM", result.get("BI", 0)) >= 64:
            assert result["wgmma"] > 0 and result["mma"] == 0, result
        else:
            assert result["mma"] > 0, result
        assert (result["tma"] > 0) == result.get("TMA", False), result
    return {launch[0] for launch in seen.values()}


def operands(
    tokens: int, hidden: int, width: int, experts: int, slots: int, dtype: torch.dtype
) -> tuple[list[Tensor], RowRouting]:
    """Operands and routing that have shapes and nothing else."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    rows = tokens * slots
    routing = RowRouting(
        empty(rows, dtype=torch.int64),
        empty(rows, dtype=torch.float32),
        empty(experts + 1, dtype=torch.int32),
        empty(rows, dtype=torch.int32),
        empty(tokens + 1, dtype=torch.int32),
        tokens,
        is_checked=True,
    )
    x, down = empty(tokens, hidden), empty(experts, hidden, width)
    return [x, empty(experts, 2 * width, hidden), down], routing


def record_both_passes(
    gpu: tuple[int, int],
    dtype: torch.dtype,
    rows_per_expert: int,
    hidden: int = 2048,
    width: int = 768,
) -> None:
    experts, slots = 128, 8
    tokens = rows_per_expert * experts // slots
    (x, gate_up, down), routing = operands(tokens, hidden, width, experts, slots, dtype)
    plan = default_plan(dtype.itemsize, rows_per_expert, is_hopper=gpu[0] >= 90)
    plan = fit_plan(plan, dtype.itemsize, gpu[1])
    _, h = forward_rows(x, gate_up, down, routing, plan, keep=True)
    need = (True, True, True)
    backward_rows(torch.empty_like(x), x, h, gate_up, down, routing, plan, need)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("gpu", "dtype", "rows_per_expert"),
    [
        (HOPPER, BF16, 1),
        (HOPPER, BF16, 512),
        pytest.param(HOPPER, BF16, 64, marks=SLOW),
        pytest.param(AMPERE, BF16, 512, marks=SLOW),
        pytest.param(HOPPER, BF16, 32, marks=SLOW),
        *(pytest.param(HOPPER, FP16, rows, marks=SLOW) for rows in (8, 32, 64, 512)),
        *(pytest.param(HOPPER, FP32, rows, marks=SLOW) for rows in (8, 512)),
        *(pytest.param(AMPERE, BF16, rows, marks=SLOW) for rows in (8, 32, 64)),
        *(pytest.param(CONSUMER, BF16, rows, marks=SLOW) for rows in (8, 32, 64, 512)),
    ],
    ids=str,
)
def test_every_default_launch(
    gpu: tuple[int, int],
    dtype: torch.dtype,
    rows_per_expert: int,
    launches: list[Launched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouped_gemm, "has_tma", lambda matrix: gpu[0] >= 90)
    record_both_passes(gpu, dtype, rows_per_expert)
    assert check(launches, gpu, dtype) == set(list(KERNELS)[:6])


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "width"), [(4096, 1024), (2048, 1408), (1000, 328)])
@pytest.mark.parametrize("rows_per_expert", [8, 512])
def test_other_shapes(
    hidden: int, width: int, rows_per_expert: int, launches: list[Launched]
) -> None:
    """Where no side is a multiple of a block, pointers carry masks."""
    record_both_passes(HOPPER, BF16, rows_per_expert, hidden, width)
    check(launches, HOPPER, BF16)


@pytest.mark.parametrize(
    "rows_per_expert", [pytest.param(8, marks=SLOW), 512], ids=["decode", "many"]
)
def test_fp8(rows_per_expert: int, launches: list[Launched]) -> None:
    tokens, experts, slots = rows_per_expert * 128 // 8, 128, 8
    (x, gate_up, down), routing = operands(tokens, 2048, 768, experts, slots, BF16)
    gate_up, down = (w.to(fp8.FP8) for w in (gate_up, down))
    scales = (x.new_empty(experts, 12, 16).float(), x.new_empty(experts, 16, 6).float())
    fp8_gemm.forward_rows_fp8(x, gate_up, scales[0], down, scales[1], routing)
    assert check(launches, HOPPER, BF16) == {*list(KERNELS)[4:]}


def test_tuned_tables_fit_hopper() -> None:
    """Every committed plan can be read and stays within the shared memory it was measured in."""
    from dvpa_kernels.tuning import TUNED, load_table, plan_from_json

    for path in TUNED.glob("*.json"):
        for entry in load_table(path):
            plan, size = plan_from_json(entry["plan"]), entry["itemsize"]
            assert shared_bytes(plan.up, plan.rows, 2, size) <= HOPPER[1], path
            assert shared_bytes(plan.down, plan.rows, 1, size) <= HOPPER[1], path


def test_a_table_is_found_by_device_shape_and_nearest_row_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    from dataclasses import replace

    from dvpa_kernels import tuning

    shape = {"itemsize": 2, "hidden": 64, "width": 32, "experts": 4}
    plans = {rows: replace(default_plan(2, rows), rows=rows) for rows in (16, 128)}
    entries = [
        {**shape, "rows_per_expert": rows, "plan": tuning.plan_to_json(plan)}
        for rows, plan in plans.items()
    ]
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.table_path("GPU X-1").write_text(json.dumps({"plans": entries}))
    for bucket, wanted in ((1, 16), (32, 16), (64, 128), (4096, 128)):
        found = tuning._lookup("GPU X-1", tuning.HOPPER, 2, 64, 32, 4, bucket)
        assert found == plans[wanted], bucket
    other = tuning._lookup("GPU X-1", tuning.HOPPER, 2, 64, 48, 4, 16)
    assert other == default_plan(2, 16)
    bad = tmp_path / "bad.json"
    bad.write_text('{"plans": [{"plan": {"rows": 16}}]}')
    with pytest.raises(ValueError, match=r"bad\.json: not a table"):
        tuning.load_table(bad)
    x, down = torch.zeros(3, 64), torch.zeros(4, 64, 32)
    assert find_plan(x, down, 12).rows == 16
