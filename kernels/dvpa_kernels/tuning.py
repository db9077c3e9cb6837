"""Launch settings of the Triton kernels: tuned tables by device and shape, and the defaults.

Nothing is tuned at run time. `python -m dvpa_kernels.tuning` on a GPU measures and writes
`tuned/<device>.json`; shapes that are not in the table get the defaults below, which compile for
sm_90a without spills (tests/test_triton_aot.py) but are not measured.

Letters: D hidden, F expert width, E experts, R rows.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Gpu:
    """What the defaults need to know: bytes of shared memory per thread block, wgmma and TMA."""

    shared: int
    is_hopper: bool


HOPPER = Gpu(227 * 1024, True)


@dataclass(frozen=True)
class Launch:
    """One kernel: block sizes, warps, pipeline stages, tiles that share weights, TMA if there is.

    `block_m` is read by the weight gradient alone; elsewhere the plan's row count takes its place.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = True
    block_m: int = 0


@dataclass(frozen=True)
class Plan:
    """All launches of one shape; `rows` and `grad_rows` are the tile heights of the two passes."""

    rows: int
    up: Launch
    down: Launch
    grad_rows: int
    grad_act: Launch
    grad_x: Launch
    grad_weight: Launch


def default_plan(itemsize: int, rows_per_expert: int, is_hopper: bool = True) -> Plan:
    """By element size and mean rows per expert, for any D, F and E.

    Few rows: the weights are read once, so narrow blocks put many programs on the GPU. Many rows:
    blocks as large as the registers hold (128 x 256 accumulators over 8 warps).
    """
    if itemsize == 4:  # fp32 multiplies outside the matrix units: small blocks
        rows = 16 if rows_per_expert <= 16 else 32
        small = Launch(block_n=64, block_k=32, warps=4, stages=3, tma=False)
        weight = Launch(block_m=32, block_n=64, block_k=32, warps=4, stages=3)
        return Plan(rows, replace(small, block_n=32), small, rows, small, small, weight)
    # Its loads wait for the token index first, which takes two of the stages.
    weight = Launch(block_m=128, block_n=128, block_k=64, warps=8, stages=5)
    if rows_per_expert <= 16:
        up = Launch(block_n=32, block_k=128, warps=4, stages=4, group=1)
        wide = Launch(block_n=64, block_k=128, warps=4, stages=4, group=1)
        return Plan(16, up, wide, 16, wide, wide, weight)
    if rows_per_expert <= 32:
        up = Launch(block_n=64, block_k=64, warps=4, stages=4, group=2)
        wide = Launch(block_n=128, block_k=64, warps=4, stages=4, group=2)
        return Plan(32, up, wide, 32, replace(wide, block_n=64), wide, weight)
    # Before Hopper operands pass through registers, which large accumulators leave no room for.
    if rows_per_expert <= 96 or not is_hopper:
        up = Launch(block_n=128, block_k=64, warps=8, stages=4, group=4)
        wide = Launch(block_n=128, block_k=64, warps=4, stages=4, group=4)
        return Plan(64, up, wide, 64, replace(wide, warps=8), wide, weight)
    up = Launch(block_n=128, block_k=64, warps=8, stages=4)
    wide = Launch(block_n=256, block_k=64, warps=8, stages=4)
    return Plan(128, up, wide, 128, replace(up, stages=3), wide, weight)


def shared_bytes(launch: Launch, rows: int, outputs: int, itemsize: int) -> int:
    """Shared memory of the pipeline: `rows` and `outputs` column blocks of operands a stage."""
    return launch.stages * launch.block_k * (rows + outputs * launch.block_n) * itemsize


def fit_plan(plan: Plan, itemsize: int, limit: int) -> Plan:
    """The plan within `limit` bytes of shared memory: fewer stages, then narrower blocks."""

    def fit(launch: Launch, rows: int, outputs: int) -> Launch:
        while shared_bytes(launch, rows, outputs, itemsize) > limit:
            if launch.stages > 2:
                launch = replace(launch, stages=launch.stages - 1)
            elif launch.block_n > 32:
                launch = replace(launch, block_n=launch.block_n // 2)
            elif launch.block_k > 16:
                launch = replace(launch, block_k=launch.block_k // 2)
            else:
                break
        return launch

    return replace(
        plan,
        up=fit(plan.up, plan.rows, 2),
        down=fit(plan.down, plan.rows, 1),
        grad_act=fit(plan.grad_act, plan.grad_rows, 1),
        grad_x=fit(plan.grad_x, plan.grad_rows, 1),
        grad_weight=fit(plan.grad_weight, plan.grad_weight.block_m, 1),
    )


def bucket_of(rows: int, experts: int) -> int:
    """Mean rows per expert, rounded up to a power of two; padding rows count as rows."""
    mean = max(1, -(-rows // max(experts, 1)))
    return 1 << (mean - 1).bit_length()


def find_plan(x: Tensor, w_down: Tensor, rows: int) -> Plan:
    """The plan for x [T, D] and w_down [E, D, F] at R rows: tuned, else the default."""
    experts, hidden, width = w_down.shape
    device, gpu = "", HOPPER
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        device = properties.name
        # The stubs of some PyTorch versions lack the attribute.
        shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        gpu = Gpu(int(shared), properties.major >= 9)
    bucket = bucket_of(rows, experts)
    return _lookup(device, gpu, x.itemsize, int(hidden), int(width), int(experts), bucket)


@cache
def _lookup(
    device: str, gpu: Gpu, itemsize: int, hidden: int, width: int, experts: int, bucket: int
) -> Plan:
    shape = {"itemsize": itemsize, "hidden": hidden, "width": width, "experts": experts}
    same = [
        entry
        for entry in (_table(device) if device else ())
        if all(entry[name] == value for name, value in shape.items())
    ]
    if not same:
        if device:
            logger.info("no tuned launches for %s on %s: defaults", shape, device)
        return fit_plan(default_plan(itemsize, bucket, gpu.is_hopper), itemsize, gpu.shared)
    # The larger of two equally near ones: a tile that is too high wastes less than one too low.
    near = min(
        same,
        key=lambda entry: (
            abs(entry["rows_per_expert"].bit_length() - bucket.bit_length()),
            -entry["rows_per_expert"],
        ),
    )
    return plan_from_json(near["plan"])


@cache
def _table(device: str) -> tuple[dict[str, Any], ...]:
    path = table_path(device)
    if not path.is_file():
        logger.info(
            "no tuned launches for %s (%s is missing): defaults; "
            "`python -m dvpa_kernels.tuning` measures them",
            device,
            path.name,
        )
        return ()
    return load_table(path)


def table_path(device: str) -> Path:
    """The table of a device, by its CUDA name."""
    return TUNED / (re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json")


def load_table(path: Path) -> tuple[dict[str, Any], ...]:
    """The entries of a table, checked.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        entries = json.loads(path.read_text())["plans"]
        for entry in entries:
            plan_from_json(entry["plan"])
            for name in ("itemsize", "hidden", "width", "experts", "rows_per_expert"):
                if not isinstance(entry[name], int):
                    raise TypeError(f"{name} must be an integer")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a table of launches ({error!r})") from error
    return tuple(entries)


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The inverse of `plan_to_json`; TypeError for unknown or missing names."""
    fields: dict[str, Any] = {
        name: Launch(**field) if isinstance(field, dict) else field for name, field in value.items()
    }
    return Plan(**fields)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Nested dictionaries of integers and booleans."""
    return asdict(plan)


if __name__ == "__main__":
    from dvpa_kernels.cli_tune import main

    main()
