"""The machines a plan can be made for: what they hold and how fast they are, as their makers say.

Data-sheet numbers, dense (no sparsity); what a run reaches of them is an assumption of the plan.
Others, measured ones for instance, come from a YAML file with the same names.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dvpa.architecture import find_config, load_yaml


@dataclass(frozen=True)
class Machine:
    """One accelerator and its place in a cluster.

    Attributes:
        name: what it is called.
        memory_bytes: what one rank may use.
        peak_flops: FLOP/s of a matrix product in the training precision.
        memory_bandwidth: bytes/s of its own memory.
        link_bandwidth: bytes/s to the others of its node, one direction.
        network_bandwidth: bytes/s to other nodes, one direction.
        gpus_per_node: how many share a node.
        layer_seconds: time one layer takes before it computes anything, per pass: launches, Python.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int = 8
    layer_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ValueError: a field that is not a positive number; `layer_seconds` may be 0.
        """
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: {self.name!r} must be a word")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            low = 0.0 if field.name == "layer_seconds" else math.ulp(0.0)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < low:
                raise ValueError(f"{field.name}: {value!r} must be a positive number")
        if int(self.gpus_per_node) != self.gpus_per_node:
            raise ValueError(f"gpus_per_node: {self.gpus_per_node} must be a whole number")


MACHINES = {
    # SXM boards; NVLink 4 (900 GB/s both ways), one 400 Gb/s InfiniBand adapter per GPU.
    "h100": Machine("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Machine("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
    # NVLink 3 (600 GB/s both ways), one 200 Gb/s adapter per GPU.
    "a100-80gb": Machine("a100-80gb", 80e9, 312e12, 2.04e12, 300e9, 25e9),
    # One process, fp32, about one AVX2 core: scripts/bench_plan.py measures yours.
    "cpu": Machine("cpu", 8e9, 60e9, 8e9, 4e9, 1e9, 1, 3e-4),
}


def find_machine(name: str | None, file: str | Path | None = None) -> Machine:
    """The machine called `name`, or the one in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown name (the message lists the known ones), or a bad file.
    """
    if file is None:
        if name not in MACHINES:
            known = ", ".join(MACHINES)
            raise ValueError(f"--gpu: {name!r} must be one of {known} (or give --gpu-file)")
        return MACHINES[name]
    path = find_config(file)
    data: dict[str, Any] = {"name": path.stem, **load_yaml(path)}
    allowed = [field.name for field in fields(Machine)]
    for key in data:
        if key not in allowed:
            raise ValueError(f"{path}: {key}: unknown key; allowed: {', '.join(allowed)}")
    missing = [name for name in allowed[:-2] if name not in data]
    if missing:
        raise ValueError(f"{path}: {missing[0]}: missing")
    try:
        return Machine(**data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
