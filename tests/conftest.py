"""What every test shares: one thread, no network, and where real data lies."""

import os

# Before anything imports torch, transformers or wandb: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import hypothesis
import pytest

# No deadline: the first call of an example pays for imports, and shared machines stall.
hypothesis.settings.register_profile("dvpa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dvpa")

REPOSITORY = Path(__file__).resolve().parent.parent


# Each of these starts several processes for one test: one such test at a time.
MANY_PROCESSES = (
    "test_faults",
    "test_finetune_parallel",
    "test_launchers",
    "test_logs",
    "test_nodes",
    "test_parallel",
    "test_start_memory",
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker: they share what is costly to make."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::")[0]).stem
            return "many processes" if name in MANY_PROCESSES else name

    return ByFile(config, log)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real inputs: $DVPA_DATA, else `shared/data` beside the repository."""
    folder = Path(os.environ.get("DVPA_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real inputs: {folder} is not a folder; set DVPA_DATA")
    return folder
