"""Whether a run can fit into the machines' memory: asked before it begins, not after a month."""

import os
from pathlib import Path

from dvpa.pricing import FP32_BYTES
from dvpa_train.config import Recipe
from dvpa_train.origins import num_weights
from dvpa_train.processes import Processes

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# File below a control group's folder, and where that folder is: cgroup v2, v1.
LIMITS = {"": ("memory.max", ""), "memory": ("memory.limit_in_bytes", "memory")}


def check_host_memory(recipe: Recipe, among: Processes, available: int | None = None) -> None:
    """Refuse what cannot fit: weights in fp32 alone, the least that is needed.

    Args:
        available: bytes of this process's machine (default: asked for).

    Raises:
        ValueError: what would need more, and what to do instead.
    """
    whole = FP32_BYTES * num_weights(recipe.model_config())
    available = host_bytes() if available is None else available
    kind = recipe.strategy.kind
    if kind != "fsdp2" and whole * among.local_size > available:
        raise ValueError(
            f"strategy.kind: {kind} has the whole model in the memory of every process, "
            f"{_gb(whole * among.local_size)} on this machine in fp32, which has "
            f"{_gb(available)}; use fsdp2"
        )
    if recipe.lora is not None and among.is_first and whole > available:
        raise ValueError(
            f"lora: the adapters are merged in the memory of the first process, {_gb(whole)} in "
            f"fp32; this machine has {_gb(available)}"
        )
    if recipe.calibration is not None and among.is_first and whole > available:
        raise ValueError(
            "calibration: the difficulty head and the tier map are fitted by the first process "
            f"with the whole model in its memory, {_gb(whole)} in fp32; this machine has "
            f"{_gb(available)}. Give calibration=null, and the run ends with the stages; or start "
            "on a larger machine"
        )


def host_bytes() -> int:
    """Memory of this machine, or of this process's control group if that is less."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return least
    for line in groups:
        _, kinds, path = line.split(":", 2)
        for kind in kinds.split(","):
            if kind in LIMITS:
                name, below = LIMITS[kind]
                folder = CGROUPS / below / path.lstrip("/")
                for place in (folder, *folder.parents):
                    if place.is_relative_to(CGROUPS):
                        least = min(least, _limit(place / name, least))
    return least


def _limit(path: Path, without: int) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return without
    return int(text) if text.isdecimal() else without  # "max"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
