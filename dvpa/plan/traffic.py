"""Bytes that each rank sends in a step, and how long its links are busy with them.

Ranks of one expert-parallel group are neighbours. All-gather and reduce-scatter run as rings that
use every adapter of a node; each rank of a node has its own.
"""

from dataclasses import dataclass

from dvpa.plan.machine import Machine
from dvpa.plan.stage_model import StageModel, amount
from dvpa.plan.workload import Assumptions, Layout


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank and seconds on its links, of one kind of exchange."""

    sent_bytes: float
    seconds: float
    formula: str


def expert_exchange(
    model: StageModel, layout: Layout, tokens: int, machine: Machine, assume: Assumptions
) -> Traffic:
    """Dispatch and combine of a micro-batch, forward and backward; again where recomputed.

    A row per token and expert: the mean k over the mix of tiers decides, not the largest.
    """
    ranks, hidden = layout.expert_parallel, model.config.hidden_size
    exchanges = 6 if layout.is_checkpointed else 4
    rows = model.num_moe_layers * tokens * model.mean_top_k
    moved = rows * hidden * assume.compute_bytes * exchanges
    inside = min(ranks, machine.gpus_per_node)
    near = moved * (inside - 1) / ranks / machine.link_bandwidth
    far = moved * (ranks - inside) / ranks / machine.network_bandwidth
    formula = (
        f"{model.num_moe_layers} MoE layers x {amount(tokens)} tokens x mean k "
        f"{model.mean_top_k:.3g} x {hidden} x {assume.compute_bytes:g} B x {exchanges} "
        f"(dispatch and combine; forward, backward{', again' if exchanges == 6 else ''}) x "
        f"{ranks - 1}/{ranks} leave the rank"
    )
    seconds = max(near, far) * assume.imbalance / assume.link_efficiency
    return Traffic(moved * (ranks - 1) / ranks, seconds, formula)


def weight_exchange(
    model: StageModel, layout: Layout, machine: Machine, assume: Assumptions
) -> Traffic:
    """Weights gathered twice (forward, backward) and gradients scattered, per micro-batch."""
    each = 2 * assume.compute_bytes + assume.reduce_bytes
    dense, owners = model.dense_params * each, layout.shard // layout.expert_parallel
    experts = model.routed_params * each / layout.expert_parallel
    near_dense = min(layout.shard, machine.gpus_per_node)
    near_experts = max(1, min(owners, machine.gpus_per_node // layout.expert_parallel))
    seconds = _ring(dense, layout.shard, near_dense, machine)
    seconds += _ring(experts, owners, near_experts, machine)
    sent = dense * (1 - 1 / layout.shard) + experts * (1 - 1 / owners)
    formula = (
        f"{each:g} B (gathered twice, gradients once) x ({amount(model.dense_params)} parameters "
        f"over {layout.shard} ranks + {amount(model.routed_params)} / {layout.expert_parallel} in "
        f"experts over {owners})"
    )
    return Traffic(sent, seconds / assume.link_efficiency, formula)


def replica_exchange(
    model: StageModel, layout: Layout, world: int, machine: Machine, assume: Assumptions
) -> Traffic:
    """Gradients of each shard summed over the replicas, once per step."""
    replicas = world // layout.shard
    params = (model.dense_params + model.routed_params) / layout.shard
    sent = 2 * assume.reduce_bytes * params * (1 - 1 / replicas)
    is_near = world <= machine.gpus_per_node
    bandwidth = machine.link_bandwidth if is_near else machine.network_bandwidth
    formula = f"2 x {assume.reduce_bytes:g} B x {amount(params)} parameters, {replicas} replicas"
    return Traffic(sent, sent / bandwidth / assume.link_efficiency, formula)


def _ring(size: float, ranks: int, near: int, machine: Machine) -> float:
    """Seconds to gather (or scatter) `size` bytes over `ranks`, `near` of them on each node.

    Inside the node every rank takes in all of it; between nodes it is taken in once for the
    `near` ranks that want the same, through their adapters side by side.
    """
    if ranks == 1:
        return 0.0
    inside = size * (1 - 1 / ranks) / machine.link_bandwidth if near > 1 else 0.0
    between = size * (1 - near / ranks) / (near * machine.network_bandwidth)
    return max(inside, between)
