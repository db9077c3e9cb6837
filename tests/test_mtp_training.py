"""Training the multi-token prediction module: what is scored, how it weighs, what it may move."""

import csv
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import left_padded, mtp_model, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dvpa.config import DvpaConfig, find_config, load_yaml
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa_train.balance import LoadBalancer, load_metrics
from dvpa_train.batches import IGNORED, Example, assign_tiers, collate_step
from dvpa_train.config import OptimizerConfig, StageConfig, load_recipe
from dvpa_train.growth import attach_head, grow
from dvpa_train.losses import MtpSchedule, Scorer, mtp_targets
from dvpa_train.main import run_recipe
from dvpa_train.module import TierModule

# Of different lengths: a prompt of one token, a completion of one, two tokens in all.
EXAMPLES = [([1, 7, 8], [9, 2]), ([1], [6, 4, 3, 5, 2]), ([1, 4, 4], [2]), ([1], [2])]
PLAIN = StageConfig("plain", "joint", 3, steps=10)
PAIRED = StageConfig("paired", "joint", 3, steps=10, distillation=0.4, switch_fraction=0.5)


def _module(model: DvpaForCausalLM, stage: StageConfig, mtp: MtpSchedule) -> TierModule:
    return TierModule(model, stage, OptimizerConfig(), seed=0, mtp=mtp)


def _batch(examples: list[Example], prompt_loss: bool = False) -> dict[str, torch.Tensor]:
    """All of a step."""
    return collate_step((examples, examples), pad_id=0, prompt_loss=prompt_loss)


def _step(module: TierModule, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward, and what is reported of it."""
    loss = module.training_step(batch, 0)
    module.end_step()
    return loss


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_loss", [False, True])
@pytest.mark.parametrize("stage", [PLAIN, PAIRED], ids=lambda stage: stage.name)
def test_loss_is_that_of_a_plain_loop_over_positions(stage: StageConfig, prompt_loss: bool) -> None:
    """Position i of a sequence predicts its token i + 2, where that token is a scored one."""
    model = mtp_model()
    batch = _batch(EXAMPLES, prompt_loss)
    module = _module(model, stage, MtpSchedule(0.3, 0.1, 0, 30))
    total = _step(module, batch)
    latest = module.latest

    batch.pop("scored")
    rows = assign_tiers(batch, stage, 0, 0)
    with torch.no_grad():
        out = model(rows.input_ids, tiers=rows.tiers, use_cache=False, with_mtp=True)
    main, _ = module.loss(out.logits, rows)
    losses, right = [], []
    for row in range(len(rows.tiers)):
        prompt, completion = EXAMPLES[row % len(EXAMPLES)]
        sequence = prompt + completion
        for position in range(len(sequence) - 2):
            target = position + 2
            if prompt_loss or target >= len(prompt):
                log_p = out.mtp_logits[row, position].log_softmax(-1)
                losses.append(-float(log_p[sequence[target]]))
                right.append(int(log_p.argmax()) == sequence[target])
    mean = sum(losses) / len(losses)
    assert latest["mtp_loss"] == pytest.approx(mean, rel=1e-5)
    assert latest["mtp_accuracy"] == pytest.approx(sum(right) / len(right))
    assert float(total.detach()) == pytest.approx(float(main) + 0.3 * mean, rel=1e-5)
    assert latest["loss"] == pytest.approx(float(total.detach()))


def test_right_guesses_are_counted() -> None:
    logits, targets = torch.zeros(1, 3, 5), torch.tensor([[4, IGNORED, 2]])
    logits[0, 0, 4] = 1e4
    is_scored = targets != IGNORED
    nll, right = Scorer().guess(logits[is_scored], targets[is_scored])
    assert right.tolist() == [True, False]
    assert nll.tolist() == pytest.approx([0.0, math.log(5)])


def test_two_documents_in_a_row_are_not_joined() -> None:
    labels = torch.tensor([[11, 12, IGNORED, 21, 22, IGNORED]])
    starts = torch.tensor([[True, False, False, True, False, False]])
    x = IGNORED
    assert mtp_targets(labels).tolist() == [[12, x, 21, 22, x]]
    # Position 2 ends a document: its state and the next document's first token do not belong.
    assert mtp_targets(labels, starts).tolist() == [[12, x, x, 22, x]]


def test_nothing_to_score_is_no_loss() -> None:
    module = _module(mtp_model(), PLAIN, MtpSchedule(0.3, 0.1))
    loss = _step(module, _batch([([1], [2])] * 3))
    assert loss.isfinite()
    assert "mtp_loss" not in module.latest
    loss.backward()


@given(first=st.integers(0, 50), steps=st.integers(1, 50), rest=st.integers(0, 50))
def test_lambda_changes_once_after_two_thirds_of_all_steps(
    first: int, steps: int, rest: int
) -> None:
    total = first + steps + rest
    schedule = MtpSchedule(0.3, 0.1, first, total)
    weights = [schedule.weight(step) for step in range(steps)]
    assert weights == sorted(weights, reverse=True)
    for step, weight in enumerate(weights, first):
        assert weight == (0.3 if step / total < 2 / 3 else 0.1)


def test_it_does_not_run_at_weight_zero_nor_without_the_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the module ran")

    batch = _batch(EXAMPLES)
    with_module = mtp_model()
    without = tiny_model()
    without.load_state_dict(with_module.state_dict(), strict=False)
    monkeypatch.setattr(DvpaForCausalLM, "mtp_states", never)
    with pytest.raises(AssertionError, match="the module ran"):
        _module(with_module, PLAIN, MtpSchedule(0.3, 0.0, 0, 30)).training_step(batch, 0)
    module = _module(with_module, PLAIN, MtpSchedule(0.3, 0.0, 20, 30))  # the last third
    loss = _step(module, batch)
    other = _module(without, PLAIN, MtpSchedule())
    assert torch.equal(loss, _step(other, batch))
    assert not {"mtp_loss", "mtp_accuracy"} & module.latest.keys()
    assert module.training_flops == other.training_flops


def test_its_flops_are_counted_and_its_positions_are_not_tokens() -> None:
    batch = _batch(EXAMPLES)
    modules = [_module(mtp_model(), PLAIN, MtpSchedule(w, w)) for w in (0.0, 0.2)]
    for module in modules:
        _step(module, batch)
    without, with_mtp = modules
    assert without.tokens_seen == with_mtp.tokens_seen == sum(len(p + c) for p, c in EXAMPLES)
    priced = price(with_mtp.model.config).tiers
    batch.pop("scored")
    tiers = assign_tiers(batch, PLAIN, 0, 0).tiers[:, 0].tolist()
    expected = sum(
        6 * (len(prompt + completion) - 1) * priced[tier].mtp_activated_params
        for tier, (prompt, completion) in zip(tiers, EXAMPLES, strict=True)
    )
    assert with_mtp.training_flops - without.training_flops == expected


# -- load balancing and growth --------------------------------------------------------------------


@torch.no_grad()
def test_its_router_is_balanced_where_it_runs() -> None:
    model = mtp_model()
    balancer = LoadBalancer(model)
    biases = [router.tier_bias.clone() for router in balancer.routers]
    assert balancer.routers[-1] is model.model.layers[3].mlp.gate
    out = model(left_padded([40, 40]).input_ids, tiers=2, use_cache=False, with_mtp=True)

    balancer.observe(out.routing)
    plain = load_metrics(balancer.load, model.config)
    balancer.update(0.01)
    assert not torch.equal(balancer.routers[0].tier_bias, biases[0])
    assert torch.equal(balancer.routers[-1].tier_bias, biases[-1])

    balancer.observe(out.routing)
    assert load_metrics(balancer.load, model.config) == plain  # the idle router is in no number
    balancer.load.zero_()
    balancer.observe((*out.routing, out.mtp_routing))
    counted = torch.bincount(out.mtp_routing.topk_index.flatten(), minlength=16)
    assert torch.equal(balancer.load[-1, 2], counted.float())
    dead = "balance/dead_experts/top"
    assert load_metrics(balancer.load, model.config)[dead] >= plain[dead]
    balancer.update(0.01)
    step = balancer.routers[-1].tier_bias[2] - biases[-1][2]
    assert torch.allclose(step, 0.01 * torch.sign(counted.float().mean() - counted))


@torch.no_grad()
def test_growing_keeps_what_lower_tiers_predict() -> None:
    full = tiny_config(num_nextn_predict_layers=1)
    small = tiny_model(full.truncate(1))
    grown = grow(small, full.truncate(2), seed=1)
    ids = left_padded([12, 12]).input_ids
    before = small(ids, tiers=0, use_cache=False, with_mtp=True)
    after = grown(ids, tiers=0, use_cache=False, with_mtp=True)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.mtp_logits, after.mtp_logits)
    experts = grown.model.layers[3].mlp.experts
    assert not experts.down_proj[4:].any()
    assert experts.gate_up_proj[4:].std() > 0
    whole = attach_head(grow(grown, full.truncate(3), seed=2), full, seed=3)
    again = whole.eval()(ids, tiers=0, use_cache=False, with_mtp=True)
    assert torch.equal(before.mtp_logits, again.mtp_logits)


@pytest.mark.parametrize("had", [0, 1])
def test_growing_neither_adds_nor_drops_it(had: int) -> None:
    small = tiny_model(tiny_config(num_nextn_predict_layers=had).truncate(1))
    wanted: DvpaConfig = tiny_config(num_nextn_predict_layers=1 - had).truncate(2)
    with pytest.raises(ValueError, match=f"num_nextn_predict_layers: {1 - had} must be the model"):
        grow(small, wanted, seed=0)


# -- recipes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with the module."""
    path = tmp_path_factory.mktemp("pico") / "pico-mtp.yaml"
    data = load_yaml(find_config("model/pico.yaml")) | {"num_nextn_predict_layers": 1}
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipe_trains_it_through_every_stage(pico: Path, tmp_path: Path) -> None:
    overrides = [
        f"model={pico}",
        "mtp={weight: [0.3, 0.0]}",
        "log_every=1",
        *(f"stages.{name}.steps=4" for name in ("foundation", "grow", "joint")),
        "stages.joint.batch_size=8",
        "difficulty.steps=2",
    ]
    run = run_recipe(
        load_recipe("train/pico.yaml", overrides), tmp_path / "run", Console(quiet=True)
    )
    loaded = DvpaForCausalLM.from_pretrained(run.checkpoint)
    assert loaded.config.num_nextn_predict_layers == 1
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with (tmp_path / "run" / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for stage, steps in (("foundation", 4), ("grow", 4), ("joint", 0)):  # the last third: weight 0
        for metric in ("mtp/loss", "mtp/accuracy"):
            logged = [r[metric] for r in rows if r["stage_name"] == stage and r[metric]]
            assert len(logged) == steps, (stage, metric)
            assert all(math.isfinite(float(value)) for value in logged)
    folder = tmp_path / "run" / "training_state"
    first, second = (
        DvpaForCausalLM.from_pretrained(folder / name / "model").model.layers[3].eh_proj.weight
        for name in ("0-foundation", "1-grow")
    )
    last = loaded.model.layers[3].eh_proj.weight
    assert not torch.equal(first, second)
    assert torch.equal(second, last)  # at weight 0 nothing moves it


def test_the_default_weight_is_v3s_where_there_is_a_module(pico: Path) -> None:
    assert load_recipe("train/pico.yaml").mtp_weights() == [0.0, 0.0]
    assert load_recipe("train/pico.yaml", [f"model={pico}"]).mtp_weights() == [0.3, 0.1]
    set_to = load_recipe("train/pico.yaml", [f"model={pico}", "mtp.weight=[0.2, 0.2]"])
    assert set_to.mtp_weights() == [0.2, 0.2]
    assert load_recipe("train/pico.yaml", ["mtp.weight=[0, 0]"]).mtp_weights() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mtp.weight=[0.3, 0.1]", r"mtp.weight: \[0.3, 0.1\] needs a model with num_nextn"),
        ("mtp.weight=[0.3]", r"mtp.weight: \[0.3\] must be two numbers in 0 .. 1"),
        ("mtp.weight=[0.3, -0.1]", "must be two numbers in 0 .. 1"),
        ("mtp.weight=[0.3, 1.5]", "must be two numbers in 0 .. 1"),
        ("mtp.weight=[0.3, .nan]", "must be two numbers in 0 .. 1"),
        ("mtp.weight=much", "weight"),
        ("mtp.wait=[0.3, 0.1]", "wait"),
    ],
)
def test_bad_weights_are_one_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("train/pico.yaml", [override])
    assert "\n" not in str(error.value)
