"""FSDP2 with expert parallelism: which parameter lies where, and how its gradient is summed.

All processes split the data. Dense parameters are sharded over all of them. Experts are sharded
over `expert_parallel` processes by expert (see `expert_parallel.py`) and, inside an expert, over
the processes that own the same ones. Losses are sums over the step's tokens already divided by the
step's count, so gradients are added up, never averaged: an expert's gradient then holds the rows
of every process without any factor of its own.

Letters: N processes, W expert-parallel processes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dvpa.model import DvpaForCausalLM
from dvpa_train.config import StrategyConfig
from dvpa_train.expert_parallel import shard_experts
from dvpa_train.origins import Origin
from dvpa_train.processes import Processes
from dvpa_train.slices import materialise, slices_of

REPLICA, EXPERT = "expert_replica", "expert_parallel"


def shard(
    model: DvpaForCausalLM,
    config: StrategyConfig,
    among: Processes,
    origin: Origin | None = None,
) -> None:
    """Shard `model` in place over all processes.

    Args:
        origin: of the weights of a model on the meta device: each process makes its own slices, and
            never the whole. None: every process holds the same weights already.

    Raises:
        ValueError: the processes do not divide the experts or their widths.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = config.expert_parallel
    whole = init_device_mesh(device, (among.size,), mesh_dim_names=("data",))
    parts = init_device_mesh(device, (among.size // ranks, ranks), mesh_dim_names=(REPLICA, EXPERT))
    policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for experts in shard_experts(model, parts[EXPERT]):
        replicas = parts[REPLICA]
        axes = {id(p): _axis(name, p, replicas.size()) for name, p in experts.named_parameters()}
        fully_shard(
            experts,
            mesh=replicas,
            mp_policy=policy,
            shard_placement_fn=lambda p, axes=axes: Shard(axes[id(p)]),  # type: ignore[misc]
        )
    layers: list[nn.Module] = list(model.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=whole, mp_policy=policy)
    fully_shard(model, mesh=whole, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(1.0)
    if origin is not None:
        materialise(model, device)
        with torch.no_grad():
            origin.fill(slices_of(model))


def _axis(name: str, parameter: Tensor, replicas: int) -> int:
    """The axis of [G, P, out, in] inside an expert that the owners of the same experts split."""
    for axis in (2, 3):
        if parameter.shape[axis] % replicas == 0:
            return axis
    raise ValueError(
        f"strategy.expert_parallel: {replicas} processes would share each expert, but {name} "
        f"{tuple(parameter.shape[2:])} has no side that they divide; raise it"
    )


def clip_gradients(parameters: list[nn.Parameter], limit: float, among: Processes) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; the norm before, on every process.

    Right for parameters that lie sharded over *all* processes, on whichever meshes, and for whole
    ones: PyTorch's own takes one mesh.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() for g in grads if isinstance(g, DTensor)]
    if not local:
        return nn.utils.clip_grad_norm_(parameters, limit)
    assert len(local) == len(grads), "all sharded, or none"
    squares = torch.stack([grad.float().square().sum() for grad in local]).sum()
    norm = among.sum(squares).sqrt()
    torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter or buffer, on every process (a collective for a sharded one)."""
    full: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full
