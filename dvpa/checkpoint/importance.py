"""What a calibration text says of a source: which experts matter, and what each tier would lose.

Letters: N sequences, L positions, D hidden, E routed experts, R rows of one expert.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dvpa.checkpoint.layer_stream import LayerStream, PlannedRouter
from dvpa.checkpoint.source import Source
from dvpa.config import DvpaConfig
from dvpa.model.decoder import DvpaDecoderLayer
from dvpa.model.experts import DvpaMoE
from dvpa.model.mtp import DvpaMtpLayer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Importance:
    """What the text says of every MoE layer's experts, in the source's order, by layer.

    `scores` fp64 [E]: REAP, the mean over an expert's tokens of gate x norm of its output, gates
    renormalised over the chosen (arXiv 2510.13999); 0 where it has no tokens. `peaks` fp64 [E]: the
    largest magnitude in its outputs. `counts` int64 [E]: its tokens.
    """

    scores: dict[int, Tensor]
    peaks: dict[int, Tensor]
    counts: dict[int, Tensor]


def measure_importance(
    source: Source, ids_NL: Tensor, progress: Progress = lambda text: None
) -> Importance:
    """Measure every MoE layer, that of multi-token prediction included.

    Raises:
        ValueError: an expert's output is not finite.
    """
    found = Importance({}, {}, {})
    config, stream = source.config, LayerStream(source)
    hidden_NLD = stream.embed(ids_NL)
    embeds_NLD = hidden_NLD.clone() if config.num_nextn_predict_layers else None
    for index in range(config.num_hidden_layers):
        progress(f"measuring layer {index}")
        with stream.layer(index) as layer:
            _measure_layer(stream, layer, index, hidden_NLD, found)
    if embeds_NLD is not None:
        progress("measuring multi-token prediction")
        index = config.num_hidden_layers
        norm = stream.norm()
        with stream.layer(index) as layer:
            module = cast("DvpaMtpLayer", layer)
            joined = torch.cat(
                (module.enorm(embeds_NLD[:, 1:]), module.hnorm(norm(hidden_NLD[:, :-1]))), -1
            )
            _measure_layer(stream, layer, index, module.eh_proj(joined), found)
    return found


def super_experts(peaks: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Experts without which a model breaks: (layer, the source's expert), layer by layer.

    Those whose largest output is above the 99.5th percentile of all layers' and above a tenth of
    the largest (arXiv 2507.23279); and ten times the median, so that a model without outliers has
    none.
    """
    if not peaks:
        return []
    every = torch.cat(list(peaks.values()))
    bound = max(float(every.quantile(0.995)), float(every.max()) / 10, 10 * float(every.median()))
    return [
        (layer, int(expert))
        for layer, of_layer in sorted(peaks.items())
        for expert in (of_layer > bound).nonzero()[:, 0]
        if math.isfinite(float(of_layer[expert]))
    ]


def tier_losses(
    source: Source,
    plans: Mapping[str, tuple[DvpaConfig, Mapping[int, Tensor]]],
    ids_NL: Tensor,
    progress: Progress = lambda text: None,
) -> dict[str, list[float]]:
    """Mean negative log-likelihood (nats per token) of the text at every tier of every plan.

    Args:
        source: whose experts they are.
        plans: config and, by layer, the experts in their planned order (int64 [E]).
        ids_NL: int64 [N, L], L at least 2.

    Returns:
        One number per tier, base first; the top tier is run once for all plans.

    Raises:
        ValueError: a loss is not finite.
    """
    stream = LayerStream(source)
    passes = [
        (name, tier) for name, (config, _) in plans.items() for tier in range(config.num_tiers - 1)
    ]
    top_NLD = stream.embed(ids_NL)
    states = {each: top_NLD.clone() for each in passes}
    for index in range(source.config.num_hidden_layers):
        progress(f"evaluating layer {index}")
        with stream.layer(index) as layer:
            stream.run(layer, top_NLD)
            for name, tier in passes:
                config, orders = plans[name]
                routes = None
                if isinstance(layer.mlp, DvpaMoE):
                    routes = PlannedRouter(layer.mlp.gate, config, orders[index], tier)
                stream.run(layer, states[name, tier], routes)
    progress("evaluating logits")
    losses = stream.losses([top_NLD, *states.values()], ids_NL)
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"{source.folder}: a loss on the calibration text is not finite: {losses}")
    top, lower = losses[0], dict(zip(states, losses[1:], strict=True))
    return {
        name: [*(lower[name, tier] for tier in range(config.num_tiers - 1)), top]
        for name, (config, _) in plans.items()
    }


def _measure_layer(
    stream: LayerStream,
    layer: DvpaDecoderLayer,
    index: int,
    hidden_NLD: Tensor,
    found: Importance,
) -> None:
    """Run a layer in place and, if it has routed experts, measure them."""
    if not layer.is_moe:
        stream.run(layer, hidden_NLD)
        return
    experts = stream.source.config.n_routed_experts
    sums = torch.zeros(experts, dtype=torch.float64)
    peaks, counts = torch.zeros_like(sums), torch.zeros(experts, dtype=torch.int64)

    def observe(expert: int, share_R: Tensor, out_RD: Tensor) -> None:
        norm_R = torch.linalg.vector_norm(out_RD.float(), dim=-1)
        sums[expert] += (share_R.double() * norm_R.double()).sum()
        peaks[expert] = max(float(peaks[expert]), float(out_RD.abs().max()))
        counts[expert] += len(share_R)

    stream.run(layer, hidden_NLD, observe=observe)
    if not bool(torch.isfinite(sums).all()):
        raise ValueError(
            f"{stream.source.folder}: layer {index}: an expert's output is not finite on the "
            "calibration text"
        )
    found.scores[index] = sums / counts.clamp(min=1)
    found.peaks[index], found.counts[index] = peaks, counts
