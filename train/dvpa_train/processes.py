"""The processes of a run: who they are, and what they tell each other beside gradients.

Started by torchrun, or a single process. Every wait has an end: a collective that a lost process
never joins fails after `strategy.timeout_s`, and the launcher starts all of them again.

Where they meet must be new with every start, or the addresses of a start that was killed are found
there. On one node torchrun keeps one store for all starts, and its restart count tells them apart.
On several nodes each launcher counts for itself, so that no count is common to all; there every
start needs a store of its own (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), whose address torchrun tells
all nodes of one rendezvous.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from dvpa_train.config import StrategyConfig


@dataclass(frozen=True)
class Processes:
    """This process among `size`, `local_size` of them on each node."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.size // self.local_size

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the processes, the same on each."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers


def end_with(parent: int) -> None:
    """In a worker: a parent that was killed cannot stop it, so it watches for that itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def processes(config: StrategyConfig) -> Iterator[Processes]:
    """Join the run's processes; left orderly, so that exit codes mean something.

    Raises:
        ValueError: the launcher's number of processes does not fit the strategy, or several nodes
            would meet in a store that outlives a start.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not is_launched():  # they would write over each other
        raise ValueError(f"WORLD_SIZE: {size} processes must be started by torchrun")
    check_size(config, size)
    if config.kind == "single" or dist.is_initialized():
        yield _known()
        return
    timeout = timedelta(seconds=config.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
            raise ValueError(
                "several nodes: a node that was lost could not come back; start them with "
                "scripts/launch_torchrun.sh, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for "
                "torchrun --rdzv-backend c10d"
            )
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store),
            rank=int(os.environ["RANK"]),
            world_size=size,
            timeout=timeout,
        )
    elif is_launched():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield _known()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def limit_waits(timeout_s: float) -> None:
    """Let the collectives of every process group of this process end after `timeout_s`.

    Groups that PyTorch and DeepSpeed make for themselves, such as a device mesh's, have 30 minutes.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def check_size(config: StrategyConfig, size: int) -> None:
    """ValueError for a number of processes that the strategy cannot use."""
    if config.kind == "single" and size > 1:
        raise ValueError(
            f"strategy.kind: single is for one process, and {size} were started; "
            "use ddp, fsdp2 or deepspeed"
        )
    if size % config.expert_parallel:
        raise ValueError(
            f"strategy.expert_parallel: {config.expert_parallel} must divide the {size} processes"
        )


def _known() -> Processes:
    if not dist.is_initialized():
        return Processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_launched() else 1
    return Processes(dist.get_rank(), dist.get_world_size(), local)
