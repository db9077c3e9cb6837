"""The operators of a decoder's forward pass without gradients, all but the routed experts."""

from dvpa_kernels.attention import latent_attention, latent_rows
from dvpa_kernels.cpu.layer import DECODE_ROWS, DecodeLayer, DecodeLayers, DecodeRows
from dvpa_kernels.cpu.layer_weights import AttentionWeights, RoutedWeights
from dvpa_kernels.dense import linear, rms_norm, swiglu
from dvpa_kernels.router import RouterTable, route

__all__ = [
    "DECODE_ROWS",
    "AttentionWeights",
    "DecodeLayer",
    "DecodeLayers",
    "DecodeRows",
    "RoutedWeights",
    "RouterTable",
    "latent_attention",
    "latent_rows",
    "linear",
    "rms_norm",
    "route",
    "swiglu",
]
