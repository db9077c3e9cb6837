"""Grouped expert MLPs for ragged, variable-k routing. Imports nothing of dvpa."""

from dvpa_kernels.ops import BACKENDS, moe_mlp
from dvpa_kernels.routing import IS_PACKAGE, RowRouting, check_routing, make_routing

__all__ = ["BACKENDS", "IS_PACKAGE", "RowRouting", "check_routing", "make_routing", "moe_mlp"]
