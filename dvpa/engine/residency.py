"""Tiers as a memory hierarchy: expert groups beyond the base pool come from disk when routed to.

One arena of slots holds the routed experts, one group of one layer in each slot. (A group is here
what pools grow by: of striped pools, one expert of each of the router's groups.) The base pool of
every layer is read once and stays; the slots left over are shared by all layers (`GroupCache`).
Every group that a layer needs is there before anything of the layer is computed.

Left out on purpose: a tier in host memory of its own. The page cache is that tier, of whatever
memory is left over; `drop_page_cache` does without it. Least recently used is the only order: where
every step passes over more upper groups than there are slots, each of them misses.

Letters: T tokens, D hidden, E routed experts, G groups, F expert width, K slots of a token (an
index of E: empty), R rows (filled slots).
"""

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dvpa.checkpoint.export import read_config
from dvpa.config import DvpaConfig
from dvpa.engine.group_cache import GroupCache, GroupUnavailable, Key, ResidencyStats
from dvpa.engine.weights import WeightFiles, load_without_experts, other_bytes
from dvpa.model import DvpaForCausalLM
from dvpa.ops import expert_mlp

__all__ = ["ExpertStore", "GroupUnavailable", "ResidencyStats", "count_slots", "load_resident"]
logger = logging.getLogger(__name__)


def load_resident(
    folder: Path,
    *,
    dtype: torch.dtype,
    max_resident_bytes: int,
    device: torch.device | str = "cpu",
    drop_page_cache: bool = False,
) -> tuple[DvpaForCausalLM, "ExpertStore"]:
    """A checkpoint whose weights never take more than `max_resident_bytes` on `device`.

    The bound is on weights: activations, the cache of keys and values and the staging buffers
    (64 KiB for each of two threads; 4 MiB, pinned, for a GPU) come on top, and while FP8 is
    dequantised four times as much. FP8 counts as `dtype`, which it is in memory. `drop_page_cache`
    has the kernel forget what was read, for containers whose limit counts that.

    Returns:
        The model in eval mode, its stacked experts on `meta`, and the store to compute them with.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: `max_resident_bytes` is too small (the message says what is needed), or the
            checkpoint is broken outside of the upper groups.
    """
    stored = read_config(folder)
    config = deepcopy(stored)
    config.num_nextn_predict_layers = 0  # such a module is checked, and stays on the disk
    slots = count_slots(config, dtype, max_resident_bytes)
    weights = WeightFiles(folder, stored, device, drop_page_cache)
    if num_fp8 := weights.count_fp8(config):
        logger.warning(
            "%s: %d weights dequantised from FP8 to %s whenever they are read",
            folder,
            num_fp8,
            str(dtype).removeprefix("torch."),
        )
    try:
        model = load_without_experts(config, weights, dtype, device)
        return model, ExpertStore(config, weights, slots, dtype=dtype, device=device)
    except BaseException:
        weights.close()
        raise


def count_slots(config: DvpaConfig, dtype: torch.dtype, max_resident_bytes: int) -> int:
    """How many groups fit beside the other weights; at most every group there is.

    Raises:
        ValueError: less than every layer's base pool and one layer's upper groups would fit.
    """
    other, group = other_bytes(config, dtype), _group_bytes(config, dtype)
    layers, base = len(_moe_layers(config)), config.tier_units(0)
    upper = config.num_units - base if layers else 0
    needed = other + (layers * base + upper) * group
    if max_resident_bytes < needed:
        raise ValueError(
            f"max_resident_bytes: {max_resident_bytes} must be at least {needed}: {other} outside "
            f"the routed experts, {layers * base * group} for the base pool of every layer, "
            f"{upper * group} for the upper groups of one"
        )
    return min((max_resident_bytes - other) // group, layers * config.num_units)


def _group_bytes(config: DvpaConfig, dtype: torch.dtype) -> int:
    expert = 3 * config.moe_intermediate_size * config.hidden_size * dtype.itemsize
    return config.unit_size * expert


def _moe_layers(config: DvpaConfig) -> range:
    return range(config.first_k_dense_replace, config.num_hidden_layers)


class ExpertStore:
    """The routed experts of all layers, in `slots` slots of one group each.

    One thread runs steps (`experts`, layers in rising order); `prefetch`, `stats` and `close` may
    be called from any other. Owns `weights` and closes them. On a GPU steps run on the default
    stream, on which slots are filled, too; a layer reads its routing back, so no graph holds it.

    Raises:
        ValueError: the base pool cannot be read, or `slots` does not hold it and one group more.
    """

    def __init__(
        self,
        config: DvpaConfig,
        weights: WeightFiles,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.backend = "auto"  # or a key of dvpa_kernels.BACKENDS
        self.layers = _moe_layers(config)
        self.base_groups = config.tier_units(0)
        pinned = self.base_groups * len(self.layers)
        needed = pinned + (len(self.layers) > 0 and self.base_groups < config.num_units)
        if slots < needed:
            raise ValueError(f"slots: {slots} must be at least {needed}")
        self._weights, self._last_layer = weights, -1
        rows, width, hidden = (
            slots * config.unit_size,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        with torch.inference_mode(False):  # the reading thread writes into them, too
            self.gate_up = torch.empty(rows, 2 * width, hidden, dtype=dtype, device=device)
            self.down = torch.empty(rows, hidden, width, dtype=dtype, device=device)
            # Arena row of each expert, by layer; entry E is the arena's own mark of an empty slot.
            # Entries of groups that are not resident are stale and never used.
            table = torch.full((config.n_routed_experts + 1,), rows, device=device)
            self._row_of = {layer: table.clone() for layer in self.layers}
        self._cache = GroupCache(range(pinned, slots), self._fill)
        self._group_bytes = _group_bytes(config, dtype)
        self._fixed_bytes = other_bytes(config, dtype) + pinned * self._group_bytes
        base = ((layer, group) for layer in self.layers for group in range(self.base_groups))
        for slot, key in enumerate(base):
            self._fill(key, slot)

    @property
    def stats(self) -> ResidencyStats:
        """What has happened so far; groups beyond the base pool only, but for `resident_bytes`."""
        resident = self._fixed_bytes + self._cache.num_used * self._group_bytes
        return replace(self._cache.stats, resident_bytes=resident)

    def experts(
        self, layer: int, hidden_TD: Tensor, topk_index: Tensor, topk_weight: Tensor
    ) -> Tensor:
        """Weighted sum of each token's experts of decoder layer `layer`: [T, D] -> [T, D].

        On the CPU and Triton kernels bitwise what the stacked experts give, wherever the groups
        lie: every token sums its own rows in its own order. `F.grouped_mm` sums in the order of the
        arena and is only close.

        Where a layer needs more upper groups than there are slots (never after `load_resident`),
        rows are computed one by one, rounded to the dtype of `hidden_TD`, and summed at the end:
        also only close, but still independent of what else is in the batch.

        Args:
            topk_index: int64 [T, K], experts of this layer (E: empty slot); topk_weight: [T, K].

        Raises:
            GroupUnavailable: a group that is needed cannot be read; there is no partial result.
        """
        if layer <= self._last_layer:
            self._cache.next_step()
        self._last_layer = layer
        upper = [group for group in self._groups_of(topk_index) if group >= self.base_groups]
        if not upper:
            return self._base_experts(layer, hidden_TD, topk_index, topk_weight)
        if len(upper) > self._cache.num_slots:
            return self._experts_in_passes(layer, upper, hidden_TD, topk_index, topk_weight)
        self._cache.bring_in({(layer, group) for group in upper})
        rows_TK = self._row_of[layer][topk_index]
        return expert_mlp(hidden_TD, self.gate_up, self.down, rows_TK, topk_weight, self.backend)

    def prefetch(self, tier: int) -> None:
        """Predict work at `tier`: read its upper groups in the background, the layers ahead first.

        Bounded by the slots that no step is using; never waits; the base tier needs nothing.

        Raises:
            ValueError: no such tier.
        """
        num_groups = self.config.tier_units(self.config.tier_index(tier))
        self._cache.prefetch(
            (layer, group)
            for layer in self._layers_ahead()
            for group in range(self.base_groups, num_groups)
        )

    def close(self) -> None:
        """Stop reading and close the files; what is resident goes on working."""
        self._cache.close()
        self._weights.close()

    def _groups_of(self, topk_index: Tensor) -> list[int]:
        """The groups in a routing table, rising. Waits for the device: only it knows them."""
        experts_S = topk_index.flatten()
        if len(experts_S) > 1024:  # decode steps are quicker without
            experts_S = experts_S.unique()
        size, groups = self.config.unit_size, range(self.config.num_units)  # an empty slot: G
        return sorted({expert // size for expert in set(experts_S.tolist())} & set(groups))

    def _base_experts(
        self, layer: int, hidden_TD: Tensor, topk_index: Tensor, topk_weight: Tensor
    ) -> Tensor:
        """The base pool of a layer lies in one piece, its experts in order."""
        pool = self.config.pool_size(0)
        first = (layer - self.layers.start) * pool
        return expert_mlp(
            hidden_TD,
            self.gate_up[first : first + pool],
            self.down[first : first + pool],
            topk_index.clamp(max=pool),
            topk_weight,
            self.backend,
        )

    def _experts_in_passes(
        self,
        layer: int,
        upper: list[int],
        hidden_TD: Tensor,
        topk_index: Tensor,
        topk_weight: Tensor,
    ) -> Tensor:
        """The base pool, then as many upper groups at a time as there are slots."""
        size = self._cache.num_slots
        resident = self._cache.resident()
        upper = sorted(upper, key=lambda group: (layer, group) not in resident)
        passes = [upper[i : i + size] for i in range(0, len(upper), size)]
        group_TK = topk_index // self.config.unit_size
        out_TKD = hidden_TD.new_zeros(*topk_index.shape, hidden_TD.shape[1])
        for groups in (list(range(self.base_groups)), *passes):
            self._cache.bring_in({(layer, group) for group in groups if group >= self.base_groups})
            here_TK = torch.isin(group_TK, torch.tensor(groups, device=group_TK.device))
            rows_R1 = self._row_of[layer][topk_index[here_TK]][:, None]
            out_TKD[here_TK] = expert_mlp(
                hidden_TD[here_TK.nonzero()[:, 0]],
                self.gate_up,
                self.down,
                rows_R1,
                torch.ones_like(rows_R1, dtype=torch.float32),
                self.backend,
            )
        empty_TK = topk_index == self.config.n_routed_experts  # whose weight may be anything
        weight_TK1 = topk_weight.float().masked_fill(empty_TK, 0.0)[..., None]
        return (out_TKD.float() * weight_TK1).sum(1).to(hidden_TD.dtype)

    def _layers_ahead(self) -> Iterator[int]:
        """The layers after the one that ran last, then the next step's."""
        done = max(self._last_layer + 1 - self.layers.start, 0)
        yield from self.layers[done:]
        yield from self.layers[:done]

    def _fill(self, key: Key, slot: int) -> int:
        """Read a group into a slot; returns the bytes read. ValueError naming file and tensor."""
        layer, group = key
        size, width = self.config.unit_size, self.config.moe_intermediate_size
        num_bytes = 0
        for i in range(size):
            expert, row = group * size + i, slot * size + i
            for name, out in (
                ("gate_proj", self.gate_up[row, :width]),
                ("up_proj", self.gate_up[row, width:]),
                ("down_proj", self.down[row]),
            ):
                tensor = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                num_bytes += self._weights.read_into(tensor, out)
        experts = slice(group * size, (group + 1) * size)
        first = slot * size
        self._row_of[layer][experts] = torch.arange(first, first + size, device=self.down.device)
        return num_bytes
