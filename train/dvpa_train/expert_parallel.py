"""Expert parallelism: every rank owns an equal slice of *every* group.

Any mix of tiers is then balanced as well as its routing is: a tier's pool lies on all ranks in
equal parts. The stacked experts [E, ...] are seen as [G, P, ...] (G groups of P experts) and
sharded on the second axis, so that a checkpoint of them knows no number of ranks.

A layer's rows travel to the experts' owners and back, ragged, by all-to-all (GShard, arXiv
2006.16668; DeepSeek-V3, arXiv 2412.19437, section 3.2): one row per token and expert. Only rows
that some tier asked for are sent.

Letters: T tokens, K slots, R rows, D hidden, E experts, G groups, P experts of a group.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dvpa.model import DvpaForCausalLM, Routing
from dvpa.model.experts import DvpaExperts
from dvpa.ops import expert_mlp

STACKED = ("gate_up_proj", "down_proj")
EXPERT_AXIS = 1  # of [G, P, ...]


class ShardedExperts(nn.Module):
    """Stands in for `DvpaExperts`: the same parameters' names, as DTensors [G, P, ...] over `mesh`.

    Args:
        experts: the whole layer, on the meta device or with the same values on every rank.
        num_groups: G.
        mesh: one axis; its size must divide P.
    """

    def __init__(self, experts: DvpaExperts, num_groups: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.num_experts, self.num_groups = experts.num_experts, num_groups
        self.group_size = experts.num_experts // num_groups
        check_divides(self.group_size, mesh.size())
        self.backend = experts.backend
        self.process_group, self.num_ranks = mesh.get_group(), mesh.size()
        for name in STACKED:
            stacked = getattr(experts, name)
            grouped = stacked.detach().unflatten(0, (num_groups, -1))
            # No broadcast: every rank cuts its slice from what it holds already.
            local = distribute_tensor(grouped, mesh, [Shard(EXPERT_AXIS)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(local, stacked.requires_grad))

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, wherever they are; every rank must call it."""
        used_TK = routing.topk_index < self.num_experts
        token_R = used_TK.nonzero()[:, 0]
        owner_R, local_R = self.locate(routing.topk_index[used_TK])
        weight_R = routing.topk_weight[used_TK]
        order = owner_R.argsort(stable=True)
        token_R, local_R, weight_R = token_R[order], local_R[order], weight_R[order]

        sent = torch.bincount(owner_R, minlength=self.num_ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        ins, outs = sent.tolist(), received.tolist()
        local_there = local_R.new_empty(sum(outs))
        dist.all_to_all_single(local_there, local_R, outs, ins, group=self.process_group)

        rows = self._exchange(hidden_TD[token_R], outs, ins)
        back = self._exchange(self._multiply(rows, local_there), ins, outs)
        weighted = back.float() * weight_R[:, None]
        summed = torch.zeros_like(hidden_TD, dtype=torch.float32).index_add(0, token_R, weighted)
        return summed.to(hidden_TD.dtype)

    def locate(self, expert: Tensor) -> tuple[Tensor, Tensor]:
        """Global expert numbers -> (rank that owns them, number among that rank's experts)."""
        slice_size = self.group_size // self.num_ranks
        group, within = expert // self.group_size, expert % self.group_size
        return within // slice_size, group * slice_size + within % slice_size

    def _exchange(self, rows: Tensor, outs: list[int], ins: list[int]) -> Tensor:
        # Its backward is a collective, too: it must run on every rank, also for no rows at all.
        if torch.is_grad_enabled() and not rows.requires_grad:
            rows = rows.requires_grad_()
        moved = all_to_all_single_autograd(rows.contiguous(), outs, ins, self.process_group)
        return moved.wait() if hasattr(moved, "wait") else moved

    def _multiply(self, rows: Tensor, local: Tensor) -> Tensor:
        """Rows [R, D] through the experts of this rank, unweighted."""
        gate_up, down = (_local(getattr(self, name)).flatten(0, 1) for name in STACKED)
        if not len(rows):  # the graph must still reach the parameters and the sender
            return rows + 0.0 * (gate_up.sum() + down.sum())
        weight = torch.ones(len(rows), 1, device=rows.device)
        return expert_mlp(rows, gate_up, down, local[:, None], weight, self.backend)


def shard_experts(model: DvpaForCausalLM, mesh: DeviceMesh) -> list[ShardedExperts]:
    """Replace the routed experts of every layer; the new modules, in the layers' order.

    Raises:
        ValueError: the ranks do not divide a group.
    """
    sharded = []
    for module in list(model.modules()):
        experts = getattr(module, "experts", None)
        if isinstance(experts, DvpaExperts):
            module.experts = ShardedExperts(experts, model.config.num_units, mesh)
            sharded.append(module.experts)
    return sharded


def check_divides(group_size: int, ranks: int) -> None:
    """ValueError unless every rank can own an equal part of each group."""
    if group_size % ranks:
        raise ValueError(
            f"strategy.expert_parallel: {ranks} must divide the {group_size} experts of a group"
        )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
