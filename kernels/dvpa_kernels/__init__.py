"""Grouped expert MLPs for ragged, variable-k routing, and what else a forward pass needs.

Imports nothing of dvpa.
"""

from dvpa_kernels.ops import BACKENDS, moe_mlp
from dvpa_kernels.routing import IS_PACKAGE, RowRouting, check_routing, make_routing

__all__ = ["BACKENDS", "IS_PACKAGE", "RowRouting", "check_routing", "make_routing", "moe_mlp"]

if IS_PACKAGE:  # for the engine only: checkpoints that bring their own code do without
    from dvpa_kernels import inference
    from dvpa_kernels.inference import *  # noqa: F403

    __all__ += inference.__all__
