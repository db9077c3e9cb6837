"""From a recipe's `strategy` to a Lightning strategy, for the GPUs that are there or for CPUs.

| kind | weights and optimizer | experts | checkpoints |
| --- | --- | --- | --- |
| single, ddp | whole on each process | whole | torch.distributed.checkpoint |
| fsdp2 | sharded over all | by expert, then inside it | torch.distributed.checkpoint |
| deepspeed | ZeRO 1, 2 or 3 | as other weights | DeepSpeed's, for equal process counts |
"""

import os
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dvpa_train.config import StrategyConfig
from dvpa_train.processes import Processes, is_launched

LOOPS = "loops.pt"


class _Distributed:
    """Weights and optimizer go through DCP; the rest of Lightning's checkpoint into one file.

    `saving` ends when all of this process's part is on the disk; the training goes on meanwhile.
    """

    saving: "Future[Any] | None" = None
    restore_checkpoint_after_setup = True  # into weights that lie where they will stay
    lightning_restore_optimizer = False
    lightning_module: Any
    optimizers: Any
    _timeout: timedelta | None = None  # Lightning's, of its process group
    _group: Any = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: see `save_checkpoint`."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: see `save_checkpoint`."""
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing: see `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing: see `load_checkpoint`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Copy this process's part, then write it in the background."""
        folder, no_dist = Path(filepath), not dist.is_initialized()
        if not no_dist and self._group is None:
            # Its own, or its collectives would meet the training's in another order.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        if no_dist or dist.get_rank() == 0:
            rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict",)}
            torch.save(rest, folder / LOOPS)
        found = dcp.async_save(
            self._state(), checkpoint_id=folder, process_group=self._group, no_dist=no_dist
        )
        self.saving = found if isinstance(found, Future) else found.upload_completion

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read what this process holds of the weights and the optimizer; return the rest."""
        state = self._state()
        dcp.load(state, checkpoint_id=checkpoint_path, no_dist=not dist.is_initialized())
        set_state_dict(
            self.lightning_module.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return torch.load(Path(checkpoint_path) / LOOPS, weights_only=False)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.lightning_module.model, self.optimizers)
        return {"model": model, "optimizer": optimizer}


class Single(_Distributed, SingleDeviceStrategy):
    """One process, one device."""


class Ddp(_Distributed, DDPStrategy):
    """The whole model on every process."""


class Fsdp2(_Distributed, ModelParallelStrategy):
    """Sharded by `dvpa_train.sharding` in the module's `configure_model`."""


def make_strategy(config: StrategyConfig, among: Processes, clip: float) -> Strategy:
    """The Lightning strategy; `clip` is the gradients' largest norm.

    Raises:
        ValueError: deepspeed is asked for and not installed.
    """
    has_gpu = torch.cuda.is_available()
    timeout = timedelta(seconds=config.timeout_s)
    backend = "nccl" if has_gpu else "gloo"
    if config.kind == "single":
        return Single("cuda:0" if has_gpu else "cpu")
    if config.kind == "ddp":
        return Ddp(process_group_backend=backend, timeout=timeout)
    if config.kind == "fsdp2":
        return Fsdp2(
            data_parallel_size=among.size,
            tensor_parallel_size=1,
            process_group_backend=backend,
            timeout=timeout,
        )
    from dvpa_train.zero import make_zero

    return make_zero(config, among, backend, timeout, clip)


def trainer_arguments(config: StrategyConfig, among: Processes, clip: float) -> dict[str, Any]:
    """What a Trainer has to know of the processes."""
    is_gpu = torch.cuda.is_available()
    return {
        "strategy": make_strategy(config, among, clip),
        "accelerator": "cuda" if is_gpu else "cpu",
        "devices": among.local_size,
        "num_nodes": among.num_nodes,
        "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": clip,  # for DeepSpeed; otherwise the module clips
        "plugins": [TorchElasticEnvironment() if is_launched() else LightningEnvironment()],
    }


def num_threads(wanted: int, among: Processes) -> int:
    """CPU threads of this process: the recipe's, but no more than the node has for each."""
    return max(1, min(wanted, (os.cpu_count() or 1) // among.local_size))
