"""Fine-tuning end to end at pico size: full and LoRA, frozen teacher, resume, export, bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_world import conversations, random_start, recipe_for, run
from rich.console import Console
from test_chat import PLAIN
from transformers import AutoModelForCausalLM

from dvpa.checkpoint import export_tier
from dvpa.cli import main
from dvpa.model import DvpaForCausalLM
from dvpa.model.answer import answer, load
from dvpa.tasks.chat import encode_chat
from dvpa_train.batches import IGNORED, assign_tiers, collate
from dvpa_train.examples import make_source
from dvpa_train.finetune import FineTuning
from dvpa_train.initial import load_initial, load_tokenizer
from dvpa_train.main import TrainedRun
from dvpa_train.module import TierModule
from dvpa_train.parts import part_of
from dvpa_train.run_report import report_run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_start(tmp_path_factory.mktemp("start") / "checkpoint")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def tuned(start: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """One finished LoRA run with a frozen teacher."""
    pytest.importorskip("peft", reason="peft is not installed (extra `lora`)")
    return run(recipe_for(start, chats), tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def fully(start: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """One finished run on the weights themselves, in two stages, router and embeddings frozen."""
    stages = (
        "stages=[{name: near, kind: joint, num_tiers: 3, steps: 4, batch_size: 8, "
        "distillation: 0.5, teacher: frozen, distill_top: true}, "
        "{name: far, kind: joint, num_tiers: 3, steps: 4, batch_size: 8}]"
    )
    recipe = recipe_for(start, chats, stages, "lora=null", "freeze=[router, embeddings]")
    return run(recipe, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("kind", ["tuned", "fully"])
def test_a_run_ends_with_an_ordinary_checkpoint(
    kind: str, start: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """generate answers, export gives a V3 model that Transformers runs to the same logits."""
    trained: TrainedRun = request.getfixturevalue(kind)
    model, tokenizer = load(trained.checkpoint)
    assert model.tier_map.is_fitted
    assert model.difficulty_head is not None
    assert tokenizer.chat_template == PLAIN
    assert model.config.vocab_size == 320 != len(tokenizer)  # the checkpoint's own, not resized
    assert model.generation_config.temperature == 0.7  # as the starting checkpoint says
    (given,) = answer(model, tokenizer, ["what is 3 plus 1 ?"], max_new_tokens=4, chat=True)
    assert given.telemetry.decided_by != "fallback"
    asked = torch.tensor([encode_chat(tokenizer, [("user", "what is 3 plus 1 ?")], True)])
    for tier, name in enumerate(model.config.tier_names):
        export_tier(trained.checkpoint, tier, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert plain.config.model_type == "deepseek_v3"
        with torch.no_grad():
            ours, theirs = model(asked, tiers=tier).logits, plain(asked).logits
        assert torch.allclose(ours, theirs, atol=1e-4)
    report = report_run(trained, Console(quiet=True))
    assert [tier["name"] for tier in report["tiers"]] == model.config.tier_names


def test_the_command_answers_in_the_chat_template(
    tuned: TrainedRun, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, few = "what is 3 plus 1 ?", ["--max-new-tokens", "3"]
    plain = len(load(start)[1].encode(question))
    for flags in ([], ["--chat"]):
        assert main(["generate", str(tuned.checkpoint), question, *few, *flags]) == 0
        assert "prompt_tokens" in capsys.readouterr().out
        assert main(["score", str(tuned.checkpoint), question, "--json", "-", *flags]) == 0
        chat = json.loads(capsys.readouterr().out)["prompt_tokens"]
        assert (chat > plain) is bool(flags)
    bare = tmp_path / "bare"
    shutil.copytree(tuned.checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    assert main(["score", str(bare), question, "--chat"]) == 2
    assert "chat template: the tokenizer has none" in capsys.readouterr().err


def test_lora_keeps_its_adapter_and_merges_it(tuned: TrainedRun, start: Path) -> None:
    from peft import PeftModel

    assert not (tuned.out / "training_state" / "0-joint" / "model").exists()
    unmerged = load_initial(start)
    PeftModel.from_pretrained(unmerged, str(tuned.out / "adapter"))
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad():
        for tier in range(3):
            old = load_initial(start).eval()(ids, tiers=tier).logits
            apart = unmerged.eval()(ids, tiers=tier).logits
            merged = tuned.model(ids, tiers=tier).logits
            assert torch.allclose(merged, apart, rtol=0, atol=1e-5)
            assert not torch.allclose(merged, old, atol=1e-3)
    for name, tensor in DvpaForCausalLM.from_pretrained(start).state_dict().items():
        if part_of(name) not in {"attention", "experts", None}:
            assert torch.equal(tuned.model.state_dict()[name], tensor), name


def test_full_fine_tuning_moves_all_but_the_frozen_parts(fully: TrainedRun, start: Path) -> None:
    after = fully.model.state_dict()
    for name, tensor in DvpaForCausalLM.from_pretrained(start).state_dict().items():
        # lm_head is tied to the embeddings in this model.
        if part_of(name) in {"router", "embeddings", "lm_head"}:
            assert torch.equal(after[name], tensor), name
        elif part_of(name) is not None:
            assert not torch.equal(after[name], tensor), name
    assert [stage.name for stage in fully.stages] == ["near", "far"]


@pytest.mark.parametrize("kind", ["tuned", "fully"])
def test_finished_stages_are_read_back_to_the_same_model(
    kind: str, request: pytest.FixtureRequest
) -> None:
    trained: TrainedRun = request.getfixturevalue(kind)
    again = run(trained.recipe, trained.out)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.model.tier_map == trained.model.tier_map


def test_an_interrupted_stage_resumes_bit_exactly(
    tuned: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off at step 5, after a checkpoint at 3; the teacher is rebuilt, adapters restored."""
    step = TierModule.training_step

    def broken(self: TierModule, *args: Any) -> Any:
        if self.global_step == 5:
            raise RuntimeError("power cut")
        return step(self, *args)

    monkeypatch.setattr(TierModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tuned.recipe, tmp_path)
    state = tmp_path / "training_state" / "0-joint" / "checkpoints"
    assert list(state.glob("*/manifest.json"))
    monkeypatch.setattr(TierModule, "training_step", step)
    resumed = run(tuned.recipe, tmp_path)
    for name, tensor in tuned.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_the_frozen_teacher_is_the_student_only_at_first(start: Path, chats: Path) -> None:
    """Equal losses before the first step; later the frozen one still gives the old logits."""
    recipe = recipe_for(start, chats, "lora=null")
    source = make_source(recipe)
    tokenizer = load_tokenizer(start, 320)
    source.prepare(tokenizer)
    stage = recipe.stages[0]
    batch = collate(source.train_batch(0, 8), tokenizer.pad_token_id, prompt_loss=False)
    rows = assign_tiers(batch, stage, seed=0, step=0)
    tuning = FineTuning(recipe, Console(quiet=True))
    model = tuning.begin()
    teacher = tuning.teacher(stage, model)
    module = TierModule(model, stage, recipe.optimizer, 0, teacher=teacher)
    taught = module._teach(rows)
    logits = model(rows.input_ids, tiers=rows.tiers, use_cache=False).logits
    frozen, _ = module.loss(logits, rows, taught)
    in_place, _ = module.loss(logits, rows)
    assert frozen.item() == pytest.approx(in_place.item(), rel=1e-6)
    frozen.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert torch.equal(module._teach(rows), taught)
    moved = model(rows.input_ids, tiers=rows.tiers, use_cache=False).logits
    frozen, in_place = module.loss(moved, rows, taught)[0], module.loss(moved, rows)[0]
    assert frozen.item() != pytest.approx(in_place.item(), rel=1e-4)
    stage.distill_top = True
    held, _ = module.loss(moved, rows, taught)
    assert held.item() != pytest.approx(frozen.item(), rel=1e-4)
    assert not any("teacher" in name for name in module.state_dict())


def test_labels_are_the_assistants_turns_and_long_rows_are_counted(
    start: Path, chats: Path
) -> None:
    recipe = recipe_for(start, chats, "data.max_length=60")
    source: Any = make_source(recipe)
    tokenizer = load_tokenizer(start, 320)
    source.prepare(tokenizer)
    # Every twentieth conversation begins with a question longer than all that is kept.
    assert 0 < source.num_dropped <= source.num_cut < 400
    assert len(source.examples) + source.num_dropped == len(source.train)
    assert f"{source.num_dropped} of them dropped" in source.describe()
    batch = collate(source.examples, tokenizer.pad_token_id, prompt_loss=False)
    assert batch["input_ids"].shape[1] <= 60
    whole = [t for t in source.train if len(t.turns) == 4 and len(t.question) < 200]
    assert whole
    texts = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != IGNORED
        assert torch.equal(labels[learned], ids.roll(-1)[learned])
        texts.append(tokenizer.decode(labels[learned]))
    for task in whole[:20]:
        first, second = task.turns[1][1], task.turns[3][1]
        assert any(text in (f"{first}</s>{second}</s>", f"{first}</s>") for text in texts)
    everything = collate(source.examples, tokenizer.pad_token_id, prompt_loss=True)["labels"]
    assert int((everything != IGNORED).sum()) == int(batch["attention_mask"][:, 1:].sum())


def test_questions_of_other_formats_go_through_the_template(start: Path, tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    rows = [{"question": f"{i} + 1 ?", "answer": f"so\n#### {i + 1}"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_for(
        start, tmp_path, f"data.files=[{{path: {path}, format: gsm8k, chat: true}}]",
        "data.chat_template=train/chat.jinja",
    )  # fmt: skip
    source: Any = make_source(recipe)
    tokenizer = load_tokenizer(start, 320, recipe.data.chat_template)
    source.prepare(tokenizer)
    prompt, completion, learned = source.examples[0]
    text = tokenizer.decode(prompt)
    assert text.startswith("<s> user:\n")  # SentencePiece begins a text with a space
    assert text.endswith("assistant:\n")
    assert tokenizer.decode(completion).endswith("</s>")  # the line end after it is not learned
    assert all(learned)
