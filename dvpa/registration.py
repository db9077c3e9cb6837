"""Makes Transformers know `model_type: dvpa` and our expert kernels, whichever package comes first.

Nothing heavy is imported for it. Where Transformers' tables are not loaded yet, an import hook
fills them the moment they are; a process that only reads tier maps or prices never loads torch. The
model tables get a stand-in that loads `dvpa.model` on first use: Transformers imports them from
inside its own half-imported modules (`transformers.modeling_layers` needs `AutoModel`), where
importing our model, which needs those modules, would run in a circle.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _OnFirstUse(type):
    """Metaclass of a stand-in: its first use puts the real class in its place."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # asked about the class itself: no reason to load it
            raise AttributeError(name)
        real = getattr(import_module("dvpa.model"), cls.__name__)
        cls.auto_class.register(real.config_class, real, exist_ok=True)
        return getattr(real, name)


def _register_config(auto: ModuleType) -> None:
    from dvpa.config import DvpaConfig

    auto.AutoConfig.register(DvpaConfig.model_type, DvpaConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from dvpa.config import DvpaConfig

    classes = {"DvpaModel": auto.AutoModel, "DvpaForCausalLM": auto.AutoModelForCausalLM}
    for name, auto_class in classes.items():
        # A `__module__` outside of Transformers means: installed code wins over a checkpoint's own.
        body = {"__module__": "dvpa.model", "config_class": DvpaConfig, "auto_class": auto_class}
        auto_class.register(DvpaConfig, _OnFirstUse(name, (), body), exist_ok=True)


def _register_experts(moe: ModuleType) -> None:
    # Transformers has imported torch by now; nothing else heavy is behind this.
    from dvpa.experts_interface import register_experts

    register_experts(moe)


_PENDING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.integrations.moe": _register_experts,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _AfterImport(MetaPathFinder):
    """Finds nothing by itself; adds our step to the end of a pending module's own import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec the other finders give, its loader followed by our step."""
        if fullname not in _PENDING:
            return None
        finders: list[Any] = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec: ModuleSpec | None = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute: Callable[[ModuleType], None] = loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                if (step := _PENDING.pop(fullname, None)) is not None:
                    step(module)

            loader.exec_module = execute_then_register
        return spec


_HOOK = _AfterImport()


def register() -> None:
    """Register what is loaded now and the rest when it loads. Calling it again changes nothing."""
    for name in [name for name in _PENDING if name in sys.modules]:
        _PENDING.pop(name)(sys.modules[name])
    if _PENDING and _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)
