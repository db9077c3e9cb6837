"""One of several processes that start a stage; writes down the memory each way of it took.

    torchrun ... tests/start_worker.py OUT

`OUT/RANK.json`: bytes of anonymous memory at the peak of each way, above what was there before; of
the slices that the process holds, of the whole model, of its largest tensor.
"""

import gc
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import tiny_config

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa_train.config import StrategyConfig
from dvpa_train.consolidate import write_model
from dvpa_train.processes import Processes, processes
from dvpa_train.sharding import shard
from dvpa_train.slices import slices_of
from dvpa_train.starts import sharded_start

STRATEGY = StrategyConfig(kind="fsdp2", expert_parallel=2)
LARGE = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 64,
    "vocab_size": 512,
}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def peak(action: Callable[[], DvpaForCausalLM]) -> tuple[int, DvpaForCausalLM]:
    """The most that `action` took at a time, and what it made."""
    gc.collect()
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    made = action()
    most = max(most, anonymous())
    done.set()
    watcher.join()
    return most - before, made


def sharded(
    config: DvpaConfig, folder: Path | None, among: Processes
) -> Callable[[], DvpaForCausalLM]:
    """As a stage starts."""

    def start() -> DvpaForCausalLM:
        begun = sharded_start(config, folder, seed=0)
        shard(begun.model, STRATEGY, among, begun.origin)
        return begun.model

    return start


def whole(config: DvpaConfig, among: Processes) -> Callable[[], DvpaForCausalLM]:
    """From a whole model on every process."""

    def start() -> DvpaForCausalLM:
        model = DvpaForCausalLM(config)
        shard(model, STRATEGY, among)
        return model

    return start


def main(out: Path) -> None:
    """Each way in turn."""
    torch.set_num_threads(1)
    full = tiny_config(**LARGE)
    with processes(STRATEGY) as among:
        sharded(tiny_config(), None, among)()  # whatever is loaded or built on first use
        found: dict[str, int] = {}
        found["drawn"], small = peak(sharded(full.truncate(2), None, among))
        write_model(small, out / "model", among)
        among.barrier()
        del small
        found["grown"], grown = peak(sharded(full.truncate(3), out / "model", among))
        parts = [part.local for part in slices_of(grown).values()]
        sizes = [tensor.numel() for tensor in grown.state_dict().values()]
        found["held"] = 4 * sum(part.numel() for part in parts)
        found["largest"], found["model"] = 4 * max(sizes), 4 * sum(sizes)
        del grown, parts
        found["whole"], _ = peak(whole(full.truncate(3), among))
        (out / f"{among.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
