"""A teacher that does not move: the starting checkpoint's top tier, whatever the student becomes.

Fine-tuning on little data can pull the top tier away from what it knew; a lower tier that learns
from it in place follows. The frozen teacher keeps the old top tier's answers as the target.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dvpa.model import DvpaForCausalLM
from dvpa_train.config import StrategyConfig
from dvpa_train.processes import Processes
from dvpa_train.sharding import shard
from dvpa_train.starts import Start

if TYPE_CHECKING:
    from peft import PeftModel


class Teacher(Protocol):
    """Whose logits the lower rows of a step learn from, all without gradient."""

    def states(self, input_ids: Tensor, tiers: Tensor) -> Tensor:
        """What its head reads, [N, S, D], of rows [N, S] at `tiers` [N, S]."""

    def head(self, states: Tensor) -> Tensor:
        """Logits of states."""

    def lay_out(self, config: StrategyConfig, among: Processes) -> None:
        """Take the place that the strategy gives it; once, on every process."""

    def logits(self, input_ids: Tensor, tiers: Tensor) -> Tensor:
        """Logits [N, S, vocab] of rows."""
        with torch.no_grad():
            return self.head(self.states(input_ids, tiers))


class FrozenTeacher(Teacher):
    """A second model beside the student: as much memory for weights again, no optimizer state.

    Args:
        start: the model, whole; or to be sharded as the student is.
    """

    def __init__(self, start: Start) -> None:
        self.model, self.origin = start.model.eval().requires_grad_(False), start.origin

    def lay_out(self, config: StrategyConfig, among: Processes) -> None:
        """See `Teacher`."""
        if self.origin is not None:
            shard(self.model, config, among, self.origin)

    def states(self, input_ids: Tensor, tiers: Tensor) -> Tensor:
        """See `Teacher`; the model moves to where the rows are."""
        if self.model.device != input_ids.device:
            self.model.to(input_ids.device)
        return _states(self.model, input_ids, tiers)

    def head(self, states: Tensor) -> Tensor:
        """See `Teacher`."""
        return _logits(self.model, states)


class AdapterTeacher(Teacher):
    """The student itself with its adapters off: no memory of its own."""

    def __init__(self, adapted: "PeftModel", student: DvpaForCausalLM) -> None:
        self.adapted, self.student = adapted, student

    def lay_out(self, config: StrategyConfig, among: Processes) -> None:
        """See `Teacher`; it lies where the student does."""

    def states(self, input_ids: Tensor, tiers: Tensor) -> Tensor:
        """See `Teacher`; the student's mode is left as it was."""
        was_training = self.student.training
        self.student.eval()
        try:
            with self.adapted.disable_adapter():
                return _states(self.student, input_ids, tiers)
        finally:
            self.student.train(was_training)

    def head(self, states: Tensor) -> Tensor:
        """See `Teacher`; the head itself is never adapted."""
        return _logits(self.student, states)


@torch.no_grad()
def _states(model: DvpaForCausalLM, input_ids: Tensor, tiers: Tensor) -> Tensor:
    out = model(input_ids, tiers=tiers, use_cache=False, with_logits=False)
    states: Tensor = out.last_hidden_state
    return states


@torch.no_grad()
def _logits(model: DvpaForCausalLM, states: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(states)
    return logits
