"""Training on paper: memory, traffic and time of a run, before there are machines; no torch."""

from dvpa.plan.layouts import Wishes as Wishes
from dvpa.plan.machine import MACHINES as MACHINES
from dvpa.plan.machine import Machine as Machine
from dvpa.plan.machine import find_machine as find_machine
from dvpa.plan.predict import StagePrediction as StagePrediction
from dvpa.plan.search import TrainingPlan as TrainingPlan
from dvpa.plan.search import plan_training as plan_training
from dvpa.plan.workload import Assumptions as Assumptions
from dvpa.plan.workload import Layout as Layout
from dvpa.plan.workload import TrainStage as TrainStage
from dvpa.plan.workload import read_assumptions as read_assumptions
