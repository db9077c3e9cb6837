"""CSV and event files by themselves; what a recipe may say of its log; peaks and memory."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from log_world import NEEDS_TENSORBOARD, csv_rows, events

from dvpa.cli import main
from dvpa.plan.machine import MACHINES
from dvpa_train.config import load_recipe
from dvpa_train.logbook import Logbook
from dvpa_train.loggers import CsvLog, TensorBoardLog
from dvpa_train.peak import DATA_SHEETS, data_sheet, find_peak
from dvpa_train.processes import Processes

PNG = bytes.fromhex(  # one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360"
    "f8cfc0f01f0005000201fe0dfd0b0000000049454e44ae426082"
)


def test_rows_are_on_the_disk_at_once_and_keep_every_bit(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    log.row(2, {"loss": 1 / 3, "stage_name": 'a "b", c'})
    assert csv_rows(log.path) == [{"step": "2", "loss": str(1 / 3), "stage_name": 'a "b", c'}]
    assert float(csv_rows(log.path)[0]["loss"]) == 1 / 3


def test_a_new_name_becomes_a_column_of_all_rows(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    log.row(1, {"loss/base": 1.0})
    log.row(2, {"loss/base": 2.0, "loss/top": 3.0})
    CsvLog(log.path).row(3, {"kl": 4.0, "loss/top": 5.0})
    assert [list(row.values()) for row in csv_rows(log.path)] == [
        ["1", "1.0", "", ""],
        ["2", "2.0", "3.0", ""],
        ["3", "", "5.0", "4.0"],
    ]


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
def test_a_line_that_a_kill_cut_short_is_dropped(cut: int, tmp_path: Path) -> None:
    """Even where what is left of it looks like a whole number."""
    log = CsvLog(tmp_path / "metrics.csv")
    log.row(5, {"loss": 1.25})
    log.row(10, {"loss": 1.125})
    log.path.write_text(log.path.read_text()[:-cut])
    again = CsvLog(log.path)
    again.rewind(10)
    again.row(10, {"loss": 1.5})
    assert [(row["step"], row["loss"]) for row in csv_rows(log.path)] == [
        ("5", "1.25"),
        ("10", "1.5"),
    ]


@NEEDS_TENSORBOARD
def test_event_files_forget_steps_in_one_start_and_over_several(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "tensorboard"
    log = TensorBoardLog(folder)
    log.rewind(0)
    for step in (1, 2, 3, 4):
        log.row(step, {"loss": float(step), "stage_name": "a"})
    log.rewind(2)
    log.row(3, {"loss": 30.0})
    log.close(failed=False)
    again = TensorBoardLog(folder)
    again.rewind(3)
    again.row(4, {"loss": 40.0})
    again.close(failed=False)
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert events(tmp_path).Tags()["scalars"] == ["loss"]


def test_figures_of_steps_that_come_again_are_dropped(tmp_path: Path) -> None:
    recipe = load_recipe("train/pico.yaml", ["loggers=[csv]"])
    with Logbook(recipe, tmp_path) as logbook:
        logbook.join(Processes())
        for step in (6, 12):
            logbook.figure(step, "load", PNG, {"expert": [0, 1], "rows": [3, step]})
        logbook.rewind(11)
    assert sorted(path.name for path in (tmp_path / "logs" / "load").iterdir()) == [
        "step-00000006.csv",
        "step-00000006.png",
    ]
    table = csv_rows(tmp_path / "logs" / "load" / "step-00000006.csv")
    assert table == [{"expert": "0", "rows": "3"}, {"expert": "1", "rows": "6"}]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with Logbook(load_recipe("train/pico.yaml"), tmp_path) as logbook:
        logbook.join(Processes(rank=1, size=2))
        logbook.begin(0)
        logbook.row(1, {"loss": 1.0})
        logbook.mark(1, "a stage")
        logbook.figure(1, "load", PNG, {"rows": [1]})
    assert not list(tmp_path.iterdir())


# -- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loggers=[csv, mlflow]", "loggers.*csv.*tensorboard.*wandb.*mlflow"),
        ("loggers=[csv, csv]", "loggers: csv, csv: each at most once"),
        ("loggers=[wandb]", "wandb needs csv"),
        ("log_every=0", "log_every must be positive"),
        ("load_every=-1", "load_every 0 or more"),
    ],
)
def test_a_log_that_cannot_be_is_one_error_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("train/pico.yaml", [override])
    assert "\n" not in str(error.value)


def test_tensorboard_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before anything is computed or written."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "tensorboard" else found(name, *more),
    )
    out = tmp_path / "run"
    arguments = ["train", "train/pico.yaml", "--out", str(out)]
    assert main([*arguments, "--set", "loggers=[csv, tensorboard]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("loggers: tensorboard is not installed: pip install 'dvpa[tensorboard]'")
    assert not out.exists()


# -- peak and memory ------------------------------------------------------------------------------


def test_a_peak_is_a_data_sheets_only_where_it_holds() -> None:
    for gpu, machine in DATA_SHEETS.items():
        assert data_sheet(gpu, "bf16") is MACHINES[machine]
        assert data_sheet(gpu, "fp32") is None  # the sheet's number is for bf16 products
    for other in ("NVIDIA H100 PCIe", "NVIDIA H20", "NVIDIA GeForce RTX 4090"):
        assert data_sheet(other, "bf16") is None


def test_a_measured_peak_says_so_and_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    peak = find_peak("fp32", Processes())
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.flops > 0
    assert peak.source == "measured: a 1024 x 1024 product in fp32"


def test_memory_is_the_most_that_was_resident() -> None:
    """In a process of its own: what earlier tests freed would be handed out again here."""
    program = """
import mmap
from pathlib import Path
from dvpa_train.metric_log import memory

before = memory()["memory/max_rss_bytes"]
resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
size = int(before - resident) + (64 << 20)  # 64 MiB more than ever
block = mmap.mmap(-1, size)
for page in range(0, size, mmap.PAGESIZE):
    block[page] = 1
grown = memory()["memory/max_rss_bytes"]
block.close()
print(before, grown, memory()["memory/max_rss_bytes"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, grown, after = map(float, done.stdout.split())
    # The kernel sums the mark up from counters that lag a little.
    assert before + (60 << 20) <= grown <= before + (72 << 20)
    assert abs(after - grown) <= 4 << 20
