"""The engine: mixed-tier continuous batching over one checkpoint, with no knowledge of HTTP.

request, pages, scheduler (no tensors) -> cache, forward, runner -> progress -> engine
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Engine": "dvpa.engine.engine",
    "EngineConfig": "dvpa.engine.config",
    "EscalationParams": "dvpa.engine.escalation",
    "Piece": "dvpa.engine.outputs",
    "QueueFull": "dvpa.engine.scheduler",
    "RequestOutput": "dvpa.engine.outputs",
    "SamplingParams": "dvpa.engine.sampling_params",
    "SpeculateParams": "dvpa.engine.sampling_params",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dvpa.engine' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
