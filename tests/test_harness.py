"""lm-eval's tasks on an engine in this process, beside Transformers on the exported tier.

Needs lm-eval (`pip install 'dvpa[eval]'`), which is not part of the test environment.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from server_world import TIERS, checkpoint, make_map
from test_cli import fails
from test_server_lm_eval import write_tasks

from dvpa.checkpoint.export import export_tier
from dvpa.cli import main
from dvpa.engine import Engine, SamplingParams

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: dvpa[eval]")

from dvpa.evaluate.harness import DvpaLM, evaluate, route  # noqa: E402  after the skip

ROLLING = """
task: dvpa_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
TEXTS = [f"what is {n} + {n + 1} ? sort the words" for n in range(12)]


def asked(*arguments: Any) -> list[Any]:
    """Requests as lm-eval hands them over."""
    return [SimpleNamespace(args=given) for given in arguments]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(checkpoint(), max_num_seqs=8, page_size=8)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("tier", [0, 2])
def test_a_tier_scores_as_its_export_does_in_transformers(
    engine: Engine, tasks: Path, tmp_path: Path, tier: int
) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    export_tier(checkpoint(), tier, tmp_path / "exported")
    theirs = HFLM(
        pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", add_bos_token=True
    )
    ours = DvpaLM(engine, tier)
    pairs = asked(*(("what is 1 + 1 ?", f" {n}") for n in range(5)), ("sort", " the words"))
    for mine, other in zip(
        ours.loglikelihood(pairs, disable_tqdm=True),
        theirs.loglikelihood(pairs, disable_tqdm=True),
        strict=True,
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    texts = asked(*((text,) for text in TEXTS))
    theirs.add_bos_token = False  # else it scores a second BOS after the one that begins a window
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-2
    )
    theirs.add_bos_token = True
    wanted = {"until": ["a"], "max_gen_toks": 8, "do_sample": False, "temperature": 0}
    prompts = asked(*((text, wanted) for text in TEXTS[:4]))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
    assert set(ours.tiers) == {TIERS[tier]}


def test_auto_routes_each_context_once_and_scores_at_its_tier(engine: Engine) -> None:
    contexts = [text + " and" * (n % 3) for n, text in enumerate(TEXTS)]
    routed = route(engine, [DvpaLM(engine).tok_encode(text) for text in contexts])
    by_policy = [
        engine.generate(text, SamplingParams(max_tokens=1))[0].telemetry.tier for text in contexts
    ]
    assert routed == by_policy
    cut = sorted(
        engine.generate(text, SamplingParams(max_tokens=1))[0].telemetry.difficulty
        for text in contexts
    )[len(contexts) // 2]
    before = engine.policy.tier_map
    engine.set_tier_map(make_map(cut, 1.9))  # half at base, half in the middle
    try:
        auto = DvpaLM(engine)
        pairs = asked(*((text, f" {n}") for text in contexts for n in range(2)))
        found = auto.loglikelihood(pairs, disable_tqdm=True)
        assert set(auto.tiers) == {"base", "middle"}
        fixed = [DvpaLM(engine, tier).loglikelihood(pairs, disable_tqdm=True) for tier in (0, 1)]
        chosen = route(engine, [auto.tok_encode(text) for text in contexts])
        for row, pair in enumerate(found):
            expected = fixed[chosen[row // 2]][row]
            assert pair == (pytest.approx(expected[0], abs=1e-4), expected[1])  # other batches
        assert auto.activated_params > 0
    finally:
        engine.set_tier_map(before)


def test_more_prompts_than_the_queue_holds_are_routed() -> None:
    small = Engine(checkpoint(), max_num_seqs=2, max_queue=2, page_size=8)
    prompts = [[1, 5 + n, 9, 12] for n in range(9)]
    assert route(small, prompts) == route(Engine(checkpoint(), page_size=8), prompts)
    assert route(small, []) == []


def test_what_cannot_be_run_is_named(engine: Engine) -> None:
    auto = DvpaLM(engine)
    with pytest.raises(ValueError, match="auto cannot score a text without a prompt"):
        auto.loglikelihood_rolling(asked(("a text",)))
    with pytest.raises(ValueError, match="beams is not known"):
        auto.generate_until(asked(("what", {"beams": 3})))
    with pytest.raises(ValueError, match="max_gen_toks: 9999"):
        auto.generate_until(asked(("what", {"max_gen_toks": 9999})))
    with pytest.raises(ValueError, match="huge"):
        DvpaLM(engine, "huge")


def test_sampling_follows_the_task(engine: Engine) -> None:
    lm = DvpaLM(engine, "top")
    greedy = lm._sampling({"until": "a", "max_gen_toks": 3, "do_sample": False, "temperature": 0.7})
    assert (greedy.is_greedy, greedy.stop, greedy.max_tokens) == (True, ("a",), 3)
    sampled = lm._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (sampled.temperature, sampled.top_p, sampled.tier) == (0.7, 0.9, 2)
    assert lm._sampling({}).is_greedy


def test_local_tasks_need_no_network(
    tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    choice, generated = tasks / "choice.yaml", tasks / "generate.yaml"
    argv = ["evaluate", str(checkpoint()), "--tasks", str(choice), str(generated)]
    target = tmp_path / "found.json"
    assert main([*argv, "--tier", "auto", "0", "top", "--limit", "6", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    for shown in ("dvpa_choice", "dvpa_generate", "acc", "exact_match", "auto", "base", "top"):
        assert shown in printed
    found = json.loads(target.read_text())["tiers"]
    assert list(found) == ["auto", "base", "top"]
    assert found["base"]["tier_share"] == {"base": 1.0, "middle": 0.0, "top": 0.0}
    assert found["base"]["mean_activated_params"] < found["top"]["mean_activated_params"]
    for tier in found.values():
        assert 0 <= tier["results"]["dvpa_choice"]["acc,none"] <= 1


def test_rolling_tasks(engine: Engine, tasks: Path) -> None:
    path = tasks / "rolling.yaml"
    path.write_text(ROLLING % (tasks.parent / "rows.jsonl"))
    (found,) = evaluate(engine, [str(path)], [2], limit=4).values()
    assert found["results"]["dvpa_rolling"]["word_perplexity,none"] > 1


def test_bad_input_is_one_clear_line(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice, ckpt = tasks / "choice.yaml", checkpoint()
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("dataset_path: json\n")
    for argv, named in (
        (["nowhere", "--tasks", choice], "nowhere"),
        ([ckpt, "--tasks", tmp_path / "nowhere.yaml"], "nowhere.yaml"),
        ([ckpt, "--tasks", nameless], "neither task nor group"),
        ([ckpt, "--tasks", choice, "--tier", "huge"], "'huge' is not a tier"),
        ([ckpt, "--tasks", choice, "--limit", "0"], "--limit: 0"),
        ([ckpt], "--tasks"),
    ):
        assert named in fails(capsys, "evaluate", *argv)
