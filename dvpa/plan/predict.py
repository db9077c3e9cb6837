"""One stage under one layout: memory, traffic and time of a step put together."""

from dataclasses import dataclass

from dvpa.plan.machine import Machine
from dvpa.plan.memory import predict_memory, total
from dvpa.plan.stage_model import Line, StageModel
from dvpa.plan.timing import predict_time
from dvpa.plan.traffic import expert_exchange, replica_exchange, weight_exchange
from dvpa.plan.workload import Assumptions, Layout, TrainStage

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StagePrediction:
    """One stage under one layout; per rank where not said otherwise.

    Attributes:
        micro_batch: examples of one forward pass.
        accumulate: micro-batches of one optimizer step.
        tokens_per_step: over all ranks, both rows of a pair counted.
        mean_top_k: experts per token, over the mix of tiers.
        memory, traffic, time: lines with their formulas; memory and time add up.
        alltoall_bytes, weight_bytes: sent per step.
        mfu: FLOPs of the model (nothing recomputed) over what the machines could do.
    """

    name: str
    micro_batch: int
    accumulate: int
    tokens_per_step: int
    mean_top_k: float
    memory: tuple[Line, ...]
    traffic: tuple[Line, ...]
    time: tuple[Line, ...]
    memory_bytes: float
    alltoall_bytes: float
    weight_bytes: float
    step_seconds: float
    tokens_per_second: float
    mfu: float
    steps: int
    gpu_hours: float
    days: float


def predict(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    micro_batch: int,
    num_gpus: int,
    machine: Machine,
    assume: Assumptions,
) -> StagePrediction:
    """What one stage needs and takes under one layout."""
    memory = predict_memory(model, stage, layout, micro_batch, assume)
    time = predict_time(model, stage, layout, micro_batch, num_gpus, machine, assume)
    traffic = _traffic(model, stage, layout, micro_batch, num_gpus, machine, assume)
    seconds = total(time)
    hours = stage.steps * seconds / SECONDS_PER_HOUR
    sent = {line.name: line.value for line in traffic}
    return StagePrediction(
        name=stage.name,
        micro_batch=micro_batch,
        accumulate=stage.examples // (num_gpus * micro_batch),
        tokens_per_step=stage.tokens,
        mean_top_k=model.mean_top_k,
        memory=memory,
        traffic=traffic,
        time=time,
        memory_bytes=total(memory),
        alltoall_bytes=sent["expert all-to-all"],
        weight_bytes=sent["weights and gradients"] + sent["replicas' gradients"],
        step_seconds=seconds,
        tokens_per_second=stage.tokens / seconds,
        mfu=model.flops_per_token * stage.tokens / (seconds * num_gpus * machine.peak_flops),
        steps=stage.steps,
        gpu_hours=hours * num_gpus,
        days=hours / 24,
    )


def _traffic(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    micro_batch: int,
    num_gpus: int,
    machine: Machine,
    assume: Assumptions,
) -> tuple[Line, ...]:
    """Bytes that a rank sends per optimizer step."""
    tokens = micro_batch * stage.rows_per_example * stage.sequence
    times = stage.examples // (num_gpus * micro_batch)
    rows = expert_exchange(model, layout, tokens, machine, assume)
    weights = weight_exchange(model, layout, machine, assume)
    replicas = replica_exchange(model, layout, num_gpus, machine, assume)
    return (
        Line("expert all-to-all", times * rows.sent_bytes, f"{times} x ({rows.formula})"),
        Line("weights and gradients", times * weights.sent_bytes, f"{times} x ({weights.formula})"),
        Line("replicas' gradients", replicas.sent_bytes, replicas.formula),
    )
