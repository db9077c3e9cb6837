"""What the kernel benchmark runs on: shapes of real models, mixes of k, random inputs, their cost.

Letters: T tokens, D hidden, F expert width, E experts, K slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mix:
    """How many experts the tokens take: token t takes tier t % len(tiers), a pair (k, pool)."""

    label: str
    tiers: tuple[tuple[int, int], ...]

    @property
    def is_uniform(self) -> bool:
        """Every token takes the same number of experts."""
        return len({k for k, _ in self.tiers}) == 1

    def slots(self, tokens: int) -> list[int]:
        """The k of every token."""
        return [self.tiers[t % len(self.tiers)][0] for t in range(tokens)]


@dataclass(frozen=True)
class Shape:
    """One MoE layer and the mixes it is measured with."""

    name: str
    hidden: int
    width: int
    experts: int
    mixes: tuple[Mix, ...]


def uniform(k: int, pool: int) -> Mix:
    """k of the first `pool` experts for every token."""
    return Mix(f"k={k}", ((k, pool),))


def mixed(*tiers: tuple[int, int]) -> Mix:
    """Tiers in turn."""
    return Mix("mixed " + "/".join(str(k) for k, _ in tiers), tiers)


_DVPA = ((4, 64), (15, 128), (27, 192), (48, 256))
SHAPES = {
    shape.name: shape
    for shape in (
        # shared/reference/kernels.md measured this one; tiers of the mix as in scripts/bench_tiers.
        Shape(
            "cpu-1024", 1024, 512, 64, (uniform(8, 64), mixed((2, 8), (4, 16), (8, 32), (16, 64)))
        ),
        Shape("deepseekmoe-16b", 2048, 1408, 64, (uniform(6, 64),)),
        Shape("dvpa-7b-32b", 4096, 1024, 256, (*(uniform(*tier) for tier in _DVPA), mixed(*_DVPA))),
        Shape("qwen3-30b-a3b", 2048, 768, 128, (uniform(8, 128),)),
        Shape("quick", 256, 128, 16, (uniform(4, 16), mixed((1, 4), (2, 8), (4, 16)))),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Operands of one case. `index` [T, K] holds E in empty slots, `weight` [T, K] zero."""

    x: Tensor
    w_gate_up: nn.Parameter
    w_down: nn.Parameter
    index: Tensor
    weight: Tensor
    is_uniform: bool

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of, in a forward+backward."""
        return [self.x, self.w_gate_up, self.w_down, self.weight]

    def trainable(self) -> "Inputs":
        """The same storage as leaves that require gradients."""
        return Inputs(
            self.x.detach().requires_grad_(),
            nn.Parameter(self.w_gate_up.detach()),
            nn.Parameter(self.w_down.detach()),
            self.index,
            self.weight.detach().requires_grad_(),
            self.is_uniform,
        )


def make_weights(
    shape: Shape, dtype: torch.dtype, device: str
) -> tuple[nn.Parameter, nn.Parameter]:
    """Random [E, 2F, D] and [E, D, F]; outputs of the order of their inputs."""
    torch.manual_seed(0)
    sizes = (
        (shape.experts, 2 * shape.width, shape.hidden),
        (shape.experts, shape.hidden, shape.width),
    )
    gate_up, down = (
        torch.empty(size, dtype=dtype, device=device).normal_(std=size[2] ** -0.5) for size in sizes
    )
    return nn.Parameter(gate_up, False), nn.Parameter(down, False)


def make_inputs(
    shape: Shape, mix: Mix, tokens: int, weights: tuple[nn.Parameter, nn.Parameter], seed: int = 1
) -> Inputs:
    """Random tokens; each takes its k distinct experts of its pool, weights summing to one.

    The weights have the dtype of x, as Transformers' routers give them: fp32 ones would make the
    pipelines (not the fused kernels) promote all rows to fp32.
    """
    device, dtype = weights[0].device, weights[0].dtype
    torch.manual_seed(seed)
    tiers = [mix.tiers[t % len(mix.tiers)] for t in range(tokens)]
    k_T = torch.tensor([k for k, _ in tiers], device=device)
    pool_T = torch.tensor([pool for _, pool in tiers], device=device)
    slots = int(k_T.max())
    scores = torch.rand(tokens, shape.experts, device=device)
    outside = torch.arange(shape.experts, device=device) >= pool_T[:, None]
    score, index = scores.masked_fill(outside, -1.0).topk(slots, dim=1)
    empty = torch.arange(slots, device=device) >= k_T[:, None]
    score = score.masked_fill(empty, 0.0)
    x = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    weight = (score / score.sum(1, keepdim=True)).to(dtype)
    return Inputs(x, *weights, index.masked_fill(empty, shape.experts), weight, mix.is_uniform)


@dataclass(frozen=True)
class Work:
    """Least work of one call: arithmetic, bytes of touched weights, bytes of everything."""

    flops: int
    weight_bytes: int
    all_bytes: int

    def limit_ms(self, bandwidth_gb_s: float, gemm_gflop_s: float) -> float:
        """No kernel can be faster: the slower of moving the bytes and doing the arithmetic."""
        return max(self.all_bytes / bandwidth_gb_s, self.flops / gemm_gflop_s) / 1e6


def work_of(inputs: Inputs, with_backward: bool) -> Work:
    """Touched weights are read once, x read, y written; nothing between is counted.

    Backward: twice the arithmetic; the weights are read once more and their gradients written.
    """
    experts, hidden, width = inputs.w_down.shape
    filled = inputs.index[inputs.index < experts]
    weight_bytes = filled.unique().numel() * 3 * hidden * width * inputs.w_down.itemsize
    tokens_bytes = 2 * inputs.x.numel() * inputs.x.itemsize
    flops = 6 * filled.numel() * hidden * width
    if with_backward:
        return Work(3 * flops, weight_bytes, 3 * weight_bytes + 2 * tokens_bytes)
    return Work(flops, weight_bytes, weight_bytes + tokens_bytes)
