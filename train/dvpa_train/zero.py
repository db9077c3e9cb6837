"""DeepSpeed ZeRO through Lightning, on GPUs and on CPUs.

Lightning's strategy refuses CPUs in three places that DeepSpeed itself does not mind; they are
passed by here. DeepSpeed's own shared-memory operator is switched off before it starts: it is built
by a compiler on first use, and a build killed half-way leaves a lock on which every later run waits
for ever, without a word.
"""

import importlib.util
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from dvpa.model import DvpaForCausalLM
from dvpa.model.experts import DvpaMoE
from dvpa_train.config import StrategyConfig
from dvpa_train.processes import Processes

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class CpuDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed over gloo, without a GPU."""

    def setup_environment(self) -> None:
        """Without the check for CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Without the check of device numbers, which CPUs do not have."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed wants a number."""
        return torch.device("cpu", 0)


def make_zero(
    config: StrategyConfig, among: Processes, backend: str, timeout: timedelta, clip: float
) -> "Strategy":
    """The strategy for `config.zero_stage`.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "strategy.kind: deepspeed is not installed (pip install 'dvpa[deepspeed]')"
        )
    without_builds()
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        # Lightning asks for it; batches are cut by the data loader.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
    }
    kind = DeepSpeedStrategy if torch.cuda.is_available() else CpuDeepSpeed
    return kind(config=settings, process_group_backend=backend, timeout=timeout)


def keep_whole(model: DvpaForCausalLM) -> None:
    """ZeRO-3 fetches a MoE layer's weights together, and lets go of them together.

    It finds the end of a module by its tensors, and a router's answer is not one: its weight would
    be gone when its gradient comes.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [DvpaMoE])


def without_builds() -> None:
    """Keep DeepSpeed from compiling anything when it starts."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
