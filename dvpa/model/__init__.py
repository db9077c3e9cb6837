"""The model: attention, router, experts, difficulty head, decoder, causal LM, answers."""

from dvpa.model.answer import Answer, answer
from dvpa.model.causal_lm import DvpaForCausalLM, DvpaOutput
from dvpa.model.decoder import DvpaModel, DvpaPreTrainedModel
from dvpa.model.router import Routing

__all__ = [
    "Answer",
    "DvpaForCausalLM",
    "DvpaModel",
    "DvpaOutput",
    "DvpaPreTrainedModel",
    "Routing",
    "answer",
]
