"""Escalation bounds as part of a map variant: what the engine does is what the study counts."""

from dataclasses import replace
from pathlib import Path

import ablate_world
import numpy as np
import pytest
from helpers import thresholds, tiny_config, tiny_model

from dvpa.ablate.escalated import answer_escalating
from dvpa.ablate.measure import measure_map
from dvpa.ablate.models import TEST_TASKS, MeasuredModel
from dvpa.ablate.study import MapVariant
from dvpa.engine import Engine, EscalationParams, RequestOutput, SamplingParams
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.tasks import Task, TaskSet, train_tokenizer
from dvpa.tiers import TierMap

TEXTS = ["one and two", "sort 312 ->", "four", "two and three and one and two 99 ->"]
NEVER, ALWAYS = EscalationParams(upper=1.0), EscalationParams(upper=0.0, lower=0.0)
MAX_TOKENS = 6


class World:
    """A checkpoint whose own greedy answers, without escalation, are the right ones."""

    def __init__(self, folder: Path) -> None:
        tokenizer = train_tokenizer(["one and two", "two and three", "sort 312 -> 123"] * 4, 300)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        eos = tokenizer.eos_token_id
        model = tiny_model(tiny_config(vocab_size=len(tokenizer), eos_token_id=eos, **ids), seed=1)
        self.folder = folder
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        self.tier_map = self._spread(model)
        model.tier_map = self.tier_map
        engine = Engine(model, tokenizer, dtype="float32", read_prompt="base")
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        self.outputs: list[RequestOutput] = engine.generate(TEXTS, params)
        tasks = [
            Task.create(text, output.text.strip() or "nothing", 0, "text")
            for text, output in zip(TEXTS, self.outputs, strict=True)
        ]
        TaskSet("test", tuple(tasks)).to_jsonl(folder / TEST_TASKS)
        self.model = replace(
            ablate_world.model(),
            parts={**ablate_world.model().parts, "test": self._table(tasks)},
        )

    def _spread(self, model: DvpaForCausalLM) -> TierMap:
        """A map under which the texts start at different tiers."""
        return thresholds(model, 0.45, 0.55)

    def _table(self, tasks: list[Task]) -> OutcomeTable:
        size, tiers = len(tasks), 3
        telemetry = [output.telemetry for output in self.outputs]
        return OutcomeTable(
            ids=[task.id for task in tasks],
            level=np.zeros(size, dtype=np.int64),
            kind=["text"] * size,
            prompt_tokens=np.array([record.prompt_tokens for record in telemetry]),
            quality=np.ones((size, tiers)),
            nll=np.ones((size, tiers)),
            difficulty=np.array([record.difficulty for record in telemetry], dtype=float),
            completion_tokens=np.full((size, tiers), MAX_TOKENS - 2),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("point"))


def test_without_escalating_it_is_the_engine_alone(world: World) -> None:
    found = answer_escalating(world.folder, world.model, world.tier_map, NEVER)
    telemetry = [output.telemetry for output in world.outputs]
    is_text = np.array([bool(output.text.strip()) for output in world.outputs])
    assert is_text.any()
    assert (found.quality[is_text] == 1.0).all()
    assert not found.times.any()
    assert found.tiers.tolist() == [record.tier for record in telemetry]
    tokens = np.mean([record.prompt_tokens - 1 + MAX_TOKENS - 2 for record in telemetry])
    assert found.cost == pytest.approx([record.flops / 2 / tokens for record in telemetry])


def test_escalating_costs_more_and_ends_higher(world: World) -> None:
    never = answer_escalating(world.folder, world.model, world.tier_map, NEVER)
    always = answer_escalating(world.folder, world.model, world.tier_map, ALWAYS)
    could = never.tiers < 2
    assert could.any()
    assert (always.times[could] > 0).all()
    assert (always.tiers[could] > never.tiers[could]).all()
    assert (always.cost[could] > never.cost[could]).all()
    assert (always.cost[~could] == never.cost[~could]).all()


def test_a_study_counts_what_the_engine_did(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Quality, cost and the rivals' budget are the engine's; the map's own curve is the table's."""
    model: MeasuredModel = ablate_world.model()
    rng = np.random.default_rng(0)
    size = len(model.parts["test"])
    engine = answer_escalating(world.folder, world.model, world.tier_map, NEVER)
    fake = replace(
        engine,
        quality=(rng.uniform(size=size) < 0.9).astype(float),
        cost=rng.uniform(150.0, 350.0, size),
        tiers=rng.integers(0, 3, size),
        times=(rng.uniform(size=size) < 0.25).astype(int),
    )
    monkeypatch.setattr("dvpa.ablate.measure.answer_escalating", lambda *_: fake)
    variant = MapVariant("up", budget="50%", escalation={"upper": 0.6})
    result, values = measure_map(model, variant, tmp_path)
    plain, _ = measure_map(model, MapVariant("up", budget="50%"))
    assert result["quality"] == pytest.approx(fake.quality.mean())
    assert values["adaptive"].tolist() == fake.quality.tolist()
    assert result["mean_activated_params"] == pytest.approx(fake.cost.mean())
    assert result["routers"]["length"]["mean_activated_params"] == pytest.approx(
        fake.cost.mean(), rel=0.01
    )
    assert result["escalation"]["share_escalated"] == pytest.approx((fake.times > 0).mean())
    assert result["escalation"]["upper"] == 0.6
    assert result["frontier"] == plain["frontier"]
    assert result["budget"] == plain["budget"]
    assert "escalation" not in plain


def test_a_point_without_questions_says_so(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_tasks\.jsonl: missing; remove the folder"):
        answer_escalating(tmp_path, world.model, world.tier_map, NEVER)
