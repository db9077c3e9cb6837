"""dvpa: difficulty-adaptive Mixture-of-Experts language models.

The public names load lazily, so that pricing, tier maps and tasks work without importing torch.
`import dvpa` also makes Transformers' Auto classes know the architecture (dvpa/registration.py).
"""

from importlib import import_module
from typing import Any

from dvpa.registration import register

__version__ = "0.1.0"
_EXPORTS = {
    "DvpaConfig": "dvpa.config",
    "TierConfig": "dvpa.config",
    "DifficultyConfig": "dvpa.config",
    "load_model_config": "dvpa.config",
    "price": "dvpa.pricing",
    "TierMap": "dvpa.tiers",
    "Policy": "dvpa.tiers",
    "DvpaForCausalLM": "dvpa.model",
    "DvpaModel": "dvpa.model",
    "answer": "dvpa.model",
    "assemble": "dvpa.checkpoint.assemble",
    "export_tier": "dvpa.checkpoint",
    "Engine": "dvpa.engine",
    "EngineConfig": "dvpa.engine",
    "EscalationParams": "dvpa.engine",
    "SamplingParams": "dvpa.engine",
    "SpeculateParams": "dvpa.engine",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dvpa' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


register()
