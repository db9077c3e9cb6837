"""The recipe end to end at pico size: stages, resume after a kill, report, bad recipes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dvpa.architecture import find_config, load_yaml
from dvpa.evaluate.outcomes import collect_outcomes
from dvpa.model import DvpaForCausalLM
from dvpa_train.config import load_recipe
from dvpa_train.main import TrainedRun, routed_costs, run_recipe
from dvpa_train.run_report import report_run

RECIPE = "train/pico.yaml"


def _run(folder: Path, overrides: list[str] | None = None) -> TrainedRun:
    return run_recipe(load_recipe(RECIPE, overrides), folder, Console(quiet=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """One finished pico run."""
    return _run(tmp_path_factory.mktemp("pico"))


def test_a_run_ends_with_a_checkpoint_that_loads_to_the_same_model(trained: TrainedRun) -> None:
    model = DvpaForCausalLM.from_pretrained(trained.checkpoint)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.tier_map == trained.model.tier_map
    assert model.tier_map.is_fitted
    assert len(AutoTokenizer.from_pretrained(trained.checkpoint)) == model.config.vocab_size


def test_stages_grow_the_tiers_and_count_their_cost(trained: TrainedRun) -> None:
    assert [stage.name for stage in trained.stages] == ["foundation", "grow", "joint"]
    for stage in trained.stages:
        assert stage.tokens > 0
        assert stage.training_flops > 6 * stage.tokens  # at least one parameter a token
    assert trained.model.config.num_tiers == 3


def test_held_out_parts_are_disjoint_and_never_trained_on(trained: TrainedRun) -> None:
    parts = {name: {task.question for task in tasks} for name, tasks in trained.tasks.items()}
    assert all(parts.values())
    names = sorted(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not parts[first] & parts[second], (first, second)


def test_running_a_finished_recipe_again_changes_nothing(trained: TrainedRun) -> None:
    before = load_file(trained.checkpoint / "model.safetensors")
    again = _run(trained.out)
    after = load_file(again.checkpoint / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_recipe_in_the_same_folder_is_refused(trained: TrainedRun) -> None:
    with pytest.raises(ValueError, match="another recipe"):
        _run(trained.out, ["seed=7"])


def test_the_report_has_every_tier_and_the_head(trained: TrainedRun) -> None:
    report = report_run(trained, Console(quiet=True))
    stored = json.loads((trained.out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert [tier["name"] for tier in report["tiers"]] == trained.model.config.tier_names
    table = collect_outcomes(trained.model, trained.tokenizer, trained.tasks["test"])
    assert (table.nll == trained.outcomes["test_whole"].nll).all()
    for tier, row in enumerate(report["tiers"]):
        assert row["nll"] == pytest.approx(table.nll[:, tier].mean())
    assert len(report["difficulty"]["partial_spearman_by_tier"]) == 3


def test_kill_minus_nine_then_resume_is_bit_exact(trained: TrainedRun, tmp_path: Path) -> None:
    """Killed in the last stage, after a checkpoint; the final weights equal the unbroken run's."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", _RUN_SLOWLY, str(folder)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    last = folder / "training_state" / "2-joint" / "checkpoints" / "step-00000005"
    try:
        deadline = time.monotonic() + 120
        while not (last / "manifest.json").is_file():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (last.parents[1] / "done.json").exists()
    assert not (folder / "checkpoint").exists()
    half = last.with_name("step-00000010")  # a write the kill cut short
    shutil.copytree(last, half)
    (half / "manifest.json").unlink()
    resumed = _run(folder)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert resumed.model.tier_map == trained.model.tier_map
    assert [s.training_flops for s in resumed.stages] == [s.training_flops for s in trained.stages]


# The same run, its last stage slowed down so that the kill falls inside it.
_RUN_SLOWLY = """
import sys, time
from pathlib import Path
from rich.console import Console
from dvpa_train.config import load_recipe
from dvpa_train.main import run_recipe
from dvpa_train.module import TierModule
step = TierModule.training_step
def slow(self, *args):
    if self.stage.name == "joint" and self.global_step >= 5:
        time.sleep(0.5)
    return step(self, *args)
TierModule.training_step = slow
run_recipe(load_recipe("train/pico.yaml"), Path(sys.argv[1]), Console(quiet=True))
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "learning_rat"),
        ("stages.joint.stepz=3", "stepz"),
        ("stages.nowhere.steps=3", "nowhere"),
        ("stages.joint.steps=0", "steps"),
        ("stages.joint.num_tiers=9", "num_tiers"),
        ("model=model/nano.yaml", "last stage"),
        ("stages.joint.tier_weights=[1]", "tier_weights"),
        ("stages.joint.distillation=2", "distillation"),
        ("seed=many", "seed"),
        ("data.graded=null", "graded or files"),
        ("wandb_mode=sometimes", "wandb_mode"),
        ("nonsense", "key.subkey=value"),
    ],
)
def test_bad_overrides_are_one_error_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(RECIPE, [override])
    assert "\n" not in str(error.value)


def test_a_model_without_a_head_cannot_be_calibrated(tmp_path: Path) -> None:
    """Said before the training, not after it."""
    model = load_yaml(find_config("model/pico.yaml"))
    del model["difficulty"]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    place = f"model={tmp_path / 'model.yaml'}"
    with pytest.raises(ValueError, match=r"calibration: the model has no difficulty head"):
        load_recipe(RECIPE, [place])
    assert load_recipe(RECIPE, [place, "calibration=null"]).calibration is None


def test_a_missing_recipe_or_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_recipe("nowhere.yaml")
    overrides = [
        "data.graded=null",
        "data.files=[{path: missing.jsonl, format: jsonl}]",
    ]
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        _run(tmp_path / "run", overrides)


def test_routed_costs_count_every_position_once(trained: TrainedRun) -> None:
    requests = trained.outcomes["calibrate"]
    costs = routed_costs([100.0, 200.0, 400.0], requests)
    read = requests.prompt_tokens - 1
    answered = requests.completion_tokens[:, 0]
    naive = [
        (100.0 * read + cost * answered).sum() / (read + answered).sum()
        for cost in (100.0, 200.0, 400.0)
    ]
    assert costs.mean(axis=0) == pytest.approx(naive)
    one = int(requests.completion_tokens[:, 0].argmax())
    tokens = (read + answered).mean()
    assert costs[one, 2] * tokens == pytest.approx(100.0 * read[one] + 400.0 * answered[one])
    assert list(trained.model.tier_map.costs) == sorted(trained.model.tier_map.costs)
