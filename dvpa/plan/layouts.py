"""The layouts there are for a model on so many ranks, and what a user may have settled already."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dvpa.plan.machine import Machine
from dvpa.plan.workload import Layout, TrainStage

if TYPE_CHECKING:
    from dvpa.architecture import Architecture

# Why a candidate is none.
GROUPS = "with an expert_parallel that does not divide a group's experts"
WORLD = "with an expert_parallel that does not divide the ranks sharing the state"


@dataclass(frozen=True)
class Wishes:
    """What the user has settled already; None: the search decides."""

    expert_parallel: int | None = None
    shard: int | None = None
    micro_batch: int | None = None
    is_checkpointed: bool | None = None
    loss_chunk: int | None = None


def check_request(
    config: "Architecture",
    stages: Sequence[TrainStage],
    machine: Machine,
    num_gpus: int,
    wishes: Wishes,
) -> None:
    node = machine.gpus_per_node
    if not stages:
        raise ValueError("stages: must not be empty")
    if num_gpus < 1 or (num_gpus % node and node % num_gpus):
        raise ValueError(f"gpus: {num_gpus} must fill whole nodes of {node}, or divide one evenly")
    for stage in stages:
        if stage.examples % num_gpus:
            raise ValueError(
                f"gpus: {num_gpus} must divide the examples of a step, "
                f"{stage.examples} in stage {stage.name}"
            )
        share = stage.examples // num_gpus
        if wishes.micro_batch is not None and (
            wishes.micro_batch < 1 or share % wishes.micro_batch
        ):
            raise ValueError(
                f"micro_batch: {wishes.micro_batch} must divide the {share} examples a step of "
                f"each rank in stage {stage.name}"
            )
    ranks = wishes.expert_parallel
    if ranks is not None and (ranks < 1 or config.unit_size % ranks):
        raise ValueError(
            f"expert_parallel: {ranks} must divide a group's {config.unit_size} experts "
            "(each rank has an equal slice of every group)"
        )
    if wishes.loss_chunk is not None and wishes.loss_chunk < 0:
        raise ValueError(f"loss_chunk: {wishes.loss_chunk} must be 0 (all at once) or positive")
    for name, value in (("expert_parallel", ranks), ("shard", wishes.shard)):
        if value is not None and (value < 1 or num_gpus % value):
            raise ValueError(f"{name}: {value} must divide the {num_gpus} ranks")
    if ranks is not None and wishes.shard is not None and wishes.shard % ranks:
        raise ValueError(f"shard: {wishes.shard} must be a multiple of expert_parallel {ranks}")


def candidates(
    config: "Architecture", num_gpus: int, wishes: Wishes, loss_chunk: int
) -> Iterator[tuple[Layout, str | None]]:
    """Every layout, with the reason why it is none."""
    for expert_parallel in divisors(num_gpus, wishes.expert_parallel):
        if expert_parallel > config.n_routed_experts:
            continue
        for shard in divisors(num_gpus, wishes.shard):
            for is_checkpointed in (False, True):
                if wishes.is_checkpointed not in (None, is_checkpointed):
                    continue
                layout = Layout(expert_parallel, shard, is_checkpointed, loss_chunk)
                if config.unit_size % expert_parallel:
                    yield layout, GROUPS
                elif shard % expert_parallel:
                    yield layout, WORLD
                else:
                    yield layout, None


def divisors(number: int, wished: int | None) -> list[int]:
    if wished is not None:
        return [wished]
    return [i for i in range(1, number + 1) if number % i == 0]
