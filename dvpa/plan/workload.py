"""What is trained (stages), how it is laid out over ranks, and what a plan takes for granted."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class TrainStage:
    """One stage, in plain numbers.

    Attributes:
        name: its name.
        num_tiers: tiers that exist in it; the model has the pool of the last of them.
        steps: optimizer steps.
        examples: sequences read per step, over all ranks.
        sequence: positions of a sequence; all of them are taken to be real tokens.
        tier_weights: how often each tier is drawn (the last is left out where examples are paired);
            empty: uniform.
        is_paired: every example runs at the top tier and at a lower one (distillation).
        switch_fraction: lower rows that change tier at a random position.
    """

    name: str
    num_tiers: int
    steps: int
    examples: int
    sequence: int
    tier_weights: tuple[float, ...] = ()
    is_paired: bool = False
    switch_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a number that is not positive, or weights that do not fit the tiers.
        """
        for name in ("num_tiers", "steps", "examples", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name}: {getattr(self, name)} must be positive")
        if self.tier_weights and len(self.tier_weights) != self.num_tiers:
            raise ValueError(f"{self.name}: tier_weights: needs {self.num_tiers} numbers")

    @property
    def rows_per_example(self) -> int:
        """Rows that one example becomes."""
        return 2 if self.is_paired and self.num_tiers > 1 else 1

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in a step."""
        return self.examples * self.rows_per_example * self.sequence

    def tier_shares(self) -> tuple[float, ...]:
        """Expected share of a step's tokens at each tier: `dvpa_train.batches.assign_tiers`."""
        count = self.num_tiers
        weights = self.tier_weights or (1.0,) * count
        if self.rows_per_example == 1:
            return tuple(weight / sum(weights) for weight in weights)
        # The part before the switch, half a row on average, is at any tier.
        switched = self.switch_fraction / 2
        lower = [*weights[:-1], 0.0]
        shares = [(1 - switched) * w / sum(lower) + switched / count for w in lower]
        shares[-1] += 1.0  # the teacher's row
        return tuple(share / 2 for share in shares)


@dataclass(frozen=True)
class Layout:
    """How a run lies over its ranks.

    Attributes:
        expert_parallel: ranks that share a layer's experts; each has an equal slice of every group.
        shard: ranks over which parameters, gradients and optimizer state are split (experts over
            `expert_parallel` of them first); the others repeat them.
        is_checkpointed: each layer keeps only its input and is computed again in the backward pass.
        loss_chunk: positions whose logits are alive at a time, each chunk's computed again in the
            backward pass; 0: all of a micro-batch at once.
    """

    expert_parallel: int
    shard: int
    is_checkpointed: bool
    loss_chunk: int = 0

    def describe(self, world: int) -> str:
        """One line for people."""
        recomputed = "every layer recomputed" if self.is_checkpointed else "no recomputation"
        replicas = f" ({world // self.shard} replicas)" if self.shard < world else ""
        chunk = f", loss in chunks of {self.loss_chunk} positions" if self.loss_chunk else ""
        return (
            f"expert_parallel {self.expert_parallel}, state over {self.shard} of {world} ranks"
            f"{replicas}, {recomputed}{chunk}"
        )


@dataclass(frozen=True)
class Assumptions:
    """What cannot be derived; every one can be set.

    Attributes:
        efficiency: of the peak, while matrices are multiplied.
        memory_efficiency: of the memory's bandwidth.
        link_efficiency: of the links' bandwidth.
        weights_overlap: share of the computing time behind which weights and gradients travel.
        alltoall_overlap: share of the expert all-to-all that is hidden (0: all of it waits).
        imbalance: rows of the busiest rank's experts over the mean.
        compute_bytes: of an activation and of a gathered weight.
        state_bytes: per parameter: bf16 weight 2, bf16 gradient 2, fp32 master copy 4, two fp32
            moments of AdamW 8. FSDP2 keeps fp32 weight 4, fp32 gradient 4, moments 8: as much.
            So does plain fp32.
        reduce_bytes: of a gradient on its way to its owner.
        experts_are_fused: 1: the experts are one operator that keeps its 2 F hidden values of a row
            for the backward pass (Triton, CPU); 0: products under autograd, which keeps 3 D + 4 F
            (the `torch` backend).
        reserved_bytes: the driver's context, NCCL's channels, fragmentation.
    """

    efficiency: float = 0.5
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    weights_overlap: float = 0.9
    alltoall_overlap: float = 0.0
    imbalance: float = 1.1
    compute_bytes: float = 2.0
    state_bytes: float = 16.0
    reduce_bytes: float = 4.0
    experts_are_fused: float = 1.0
    reserved_bytes: float = 5e9

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: the assumption, its value and what is allowed.
        """
        ranges = {
            "efficiency": (1e-6, 1.0),
            "memory_efficiency": (1e-6, 1.0),
            "link_efficiency": (1e-6, 1.0),
            "weights_overlap": (0.0, 1.0),
            "alltoall_overlap": (0.0, 1.0),
            "imbalance": (1.0, 1000.0),
            "compute_bytes": (1.0, 8.0),
            "state_bytes": (1.0, 64.0),
            "reduce_bytes": (1.0, 8.0),
            "experts_are_fused": (0.0, 1.0),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = ranges.get(field.name, (0.0, 1e18))
            if not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"{field.name}: {value} must be in {low:g} .. {high:g}")


def read_assumptions(settings: list[str]) -> Assumptions:
    """Defaults, with `NAME=VALUE` settings on top.

    Raises:
        ValueError: not of that form, an unknown name, or a value out of range.
    """
    known = [field.name for field in fields(Assumptions)]
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise ValueError(f"--assume {setting}: {name!r} must be one of {', '.join(known)}")
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"--assume {setting}: {text!r} must be a number") from None
    try:
        return Assumptions(**values)
    except ValueError as error:
        raise ValueError(f"--assume {error}") from None
