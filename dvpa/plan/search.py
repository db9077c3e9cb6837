"""From a model, a recipe's stages and a machine to the fastest layout that fits.

One layout holds for the whole run, as in a recipe; the micro-batch is each stage's own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dvpa.plan.layouts import Wishes, candidates, check_request, divisors
from dvpa.plan.machine import Machine
from dvpa.plan.memory import predict_host_memory
from dvpa.plan.predict import StagePrediction, predict
from dvpa.plan.stage_model import Line, StageModel, stage_model
from dvpa.plan.workload import Assumptions, Layout, TrainStage

if TYPE_CHECKING:
    from dvpa.architecture import Architecture

LOSS_CHUNK = 1024  # positions; tried where nothing fits with all logits at once
# Why a candidate was passed over; a plan counts them.
SLOWER = "feasible but slower"
WHOLE = "too large, with all logits at once"
MEMORY = "too large, with the loss in chunks"


@dataclass(frozen=True)
class TrainingPlan:
    """The chosen layout, what it costs, and how many others were passed over and why.

    `host_memory`: of the largest stage, bytes beside the accelerators; they do not add up.
    `days_by_expert_parallel`: the fastest feasible layout of each degree; `accumulate` and
    `micro_batch` are in the stages. `model_params` counts multi-token prediction modules.
    """

    model_params: int
    machine: Machine
    num_gpus: int
    assumptions: Assumptions
    layout: Layout
    stages: tuple[StagePrediction, ...]
    host_memory: tuple[Line, ...]
    passed_over: dict[str, int]
    days_by_expert_parallel: dict[int, float]
    gpu_hours: float
    days: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, the schema of `dvpa plan --train --json`."""
        return asdict(self)


def plan_training(
    config: "Architecture",
    stages: Sequence[TrainStage],
    machine: Machine,
    num_gpus: int,
    assumptions: Assumptions | None = None,
    wishes: Wishes | None = None,
) -> TrainingPlan:
    """The fastest layout under which every stage fits into memory.

    Raises:
        ValueError: ranks that do not fill nodes, a batch that cannot be spread over them, a wish
            that cannot be met, or a model that does not fit; the message says by how much.
    """
    assume, wishes = assumptions or Assumptions(), wishes or Wishes()
    check_request(config, stages, machine, num_gpus, wishes)
    models = [stage_model(config, stage) for stage in stages]
    search = _Search(config, models, stages, machine, num_gpus, assume, wishes)
    chunks = [0, LOSS_CHUNK] if wishes.loss_chunk is None else [wishes.loss_chunk]
    for chunk in chunks:
        search.run(chunk)
        if search.best is not None:
            break
    else:
        raise ValueError(search.failure())
    hours, layout, predictions = search.best
    largest = max(models, key=lambda model: model.dense_params + model.routed_params)
    return TrainingPlan(
        model_params=largest.dense_params + largest.routed_params,
        machine=machine,
        num_gpus=num_gpus,
        assumptions=assume,
        layout=layout,
        stages=predictions,
        host_memory=predict_host_memory(largest, layout),
        passed_over=dict(search.passed_over),
        days_by_expert_parallel=search.days,
        gpu_hours=hours,
        days=sum(prediction.days for prediction in predictions),
    )


@dataclass
class _Search:
    """Every layout in turn; keeps the fastest, and counts why the others are not it."""

    config: "Architecture"
    models: Sequence[StageModel]
    stages: Sequence[TrainStage]
    machine: Machine
    num_gpus: int
    assume: Assumptions
    wishes: Wishes
    best: tuple[float, Layout, tuple[StagePrediction, ...]] | None = None
    least: tuple[float, Layout] | None = None  # bytes of the layout that came closest
    passed_over: Counter[str] = field(default_factory=Counter)
    days: dict[int, float] = field(default_factory=dict)  # the fastest, by expert_parallel

    def run(self, loss_chunk: int) -> None:
        """Try every layout with this `loss_chunk`."""
        for layout, reason in candidates(self.config, self.num_gpus, self.wishes, loss_chunk):
            if reason is not None:
                # Whatever the loss does, so counted once.
                self.passed_over[reason] += loss_chunk in (0, self.wishes.loss_chunk)
                continue
            chosen = self._fill(layout)
            if chosen is None:
                self.passed_over[MEMORY if loss_chunk else WHOLE] += 1
                continue
            hours = sum(prediction.gpu_hours for prediction in chosen)
            days, ranks = hours / 24 / self.num_gpus, layout.expert_parallel
            self.days[ranks] = min(self.days.get(ranks, days), days)
            if self.best is not None:
                self.passed_over[SLOWER] += 1
            if self.best is None or hours < self.best[0]:
                self.best = (hours, layout, chosen)

    def _fill(self, layout: Layout) -> tuple[StagePrediction, ...] | None:
        """The fastest micro-batch of every stage; None if some stage does not fit at any."""
        limit, chosen, need = self.machine.memory_bytes, [], 0.0
        for model, stage in zip(self.models, self.stages, strict=True):
            options = [
                predict(model, stage, layout, micro, self.num_gpus, self.machine, self.assume)
                for micro in divisors(stage.examples // self.num_gpus, self.wishes.micro_batch)
            ]
            need = max(need, min(option.memory_bytes for option in options))
            fitting = [option for option in options if option.memory_bytes <= limit]
            if fitting:
                chosen.append(min(fitting, key=lambda option: option.step_seconds))
        if self.least is None or need < self.least[0]:
            self.least = (need, layout)
        return tuple(chosen) if len(chosen) == len(self.stages) else None

    def failure(self) -> str:
        """Why there is no layout, and how close the best one came."""
        counts = "; ".join(f"{count} {reason}" for reason, count in self.passed_over.items())
        text = f"no layout for {self.num_gpus} x {self.machine.name}: {counts}"
        if self.least is None:
            return text
        size, layout = self.least
        limit = self.machine.memory_bytes
        return (
            f"{text}; the closest needs {size / 1e9:.1f} of {limit / 1e9:.0f} GB a rank "
            f"({layout.describe(self.num_gpus)})"
        )
