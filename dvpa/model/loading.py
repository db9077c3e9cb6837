"""Why a checkpoint cannot be loaded, in one sentence that names the tensor.

Transformers reports some failures of loading without saying which tensor caused them. Nothing here
runs unless loading failed.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dvpa.config import DvpaConfig
from dvpa.fp8 import SCALE_SUFFIX, fp8_problem, is_scale
from dvpa.model.tensor_names import tensor_shapes


def find_problem(folder: Path, config: DvpaConfig, ignored: Iterable[str] = ()) -> str | None:
    """The first corrupt shard or misfitting tensor of a folder; None if everything fits.

    Tensors that match one of the patterns `ignored` may be there in vain.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except SafetensorError as error:
            return f"{path.name}: {error}"
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            return f"{name}: missing"
        if found[name][1] != shape:
            return f"{name}: shape {found[name][1]}, expected {shape}"
    coded = {name for name, (dtype, _) in found.items() if dtype.startswith("F8")}
    for name in sorted(coded):
        scale = found.get(name + SCALE_SUFFIX)
        problem = fp8_problem(name, found[name], scale, config.has_fp8_weights)
        if problem is not None:
            return problem
    unknown = (name for name in found if name not in expected and not is_scale(name, coded))
    kept = (name for name in unknown if not any(re.search(p, name) for p in ignored))
    return next((f"{name}: unknown tensor" for name in kept), None)
