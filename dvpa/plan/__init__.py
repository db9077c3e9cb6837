"""Training on paper: memory, traffic and time of a run, before there are machines for it.

Analytic, no torch. `plan_training` takes plain numbers (`TrainStage`); the command line reads them
from a recipe.
"""

from dvpa.plan.layouts import Wishes
from dvpa.plan.machine import MACHINES, Machine, find_machine
from dvpa.plan.predict import StagePrediction
from dvpa.plan.search import TrainingPlan, plan_training
from dvpa.plan.workload import Assumptions, Layout, TrainStage, read_assumptions

__all__ = [
    "MACHINES",
    "Assumptions",
    "Layout",
    "Machine",
    "StagePrediction",
    "TrainStage",
    "TrainingPlan",
    "Wishes",
    "find_machine",
    "plan_training",
    "read_assumptions",
]
