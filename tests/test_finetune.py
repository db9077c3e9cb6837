"""Fine-tuning end to end at pico size: full and LoRA, frozen teacher, resume, export, bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_chat import PLAIN
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpa.checkpoint import export_tier
from dvpa.cli import main
from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.model.answer import answer, load
from dvpa.tasks import train_tokenizer
from dvpa.tasks.chat import encode_chat
from dvpa_train.batches import IGNORED, assign_tiers, collate
from dvpa_train.config import Recipe, load_recipe
from dvpa_train.examples import make_source
from dvpa_train.finetune import FineTuning
from dvpa_train.initial import fingerprint, load_initial, load_tokenizer
from dvpa_train.main import TrainedRun, _claim, run_recipe
from dvpa_train.module import TierModule
from dvpa_train.parts import part_of
from dvpa_train.run_report import report_run

RECIPE = "train/finetune.yaml"
FEW = [
    "stages.joint.num_tiers=3", "stages.joint.tier_weights=[0.6, 0.4, 0.0]",
    "stages.joint.steps=6", "stages.joint.warmup_steps=1", "checkpoint_every=3",
    "optimizer.learning_rate=0.01",
    "difficulty={items: 40, steps: 20, batch_size: 16}",
    'calibration={budget: "90%", items: 40}',
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pico checkpoint whose experts matter, with a tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    config = load_model_config("model/pico.yaml")
    config.initializer_range = 0.3
    torch.manual_seed(0)
    model = DvpaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(folder)
    lines = [f"what is {i} plus {i + 1} ? user: assistant: sum" for i in range(50)]
    tokenizer = train_tokenizer(lines, 310)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred conversations of one or two questions, every twentieth far too long."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for i in range(400):
        messages = []
        for k in range(1 + i % 2):
            question = f"what is {i} plus {k + 1} ?" + " please" * (100 * (i % 20 == 0))
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": str(i + k + 1)},
            ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows))
    return path


def recipe_for(start: Path, chats: Path, *overrides: str) -> Recipe:
    ours = [
        f"initial_checkpoint={start}", f"data.files=[{{path: {chats}, format: chat}}]",
        "data.chat_template=null", "data.validation_fraction=0.5", *FEW,
    ]  # fmt: skip
    return load_recipe(RECIPE, [*ours, *overrides])


def run(recipe: Recipe, out: Path) -> TrainedRun:
    return run_recipe(recipe, out, Console(quiet=True))


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
    assert module.training_flops > 0
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=model/pico.yaml"], "either model or initial_checkpoint"),
        (["initial_checkpoint=null"], "either model or initial_checkpoint"),
        (["initial_checkpoint=nowhere"], "nowhere"),
        (["initial_checkpoint=null", "model=model/pico.yaml"], "needs an initial_checkpoint"),
        (["stages.joint.kind=expansion"], "kind: expansion must be joint"),
        (["stages.joint.num_tiers=2", "stages.joint.tier_weights=[]"], "must be the 3 of"),
        (["stages.joint.distillation=0"], "teacher: frozen needs distillation above 0"),
        (["stages.joint.teacher=in_place", "stages.joint.distill_top=true"], "needs teacher"),
        (["freeze=[router]"], "leave freeze out"),
        (["lora=null", "freeze=[routers]"], "'routers' must be one of embeddings"),
        (["lora.targets=[q_proj]"], "'q_proj' must be one of attention"),
        (["lora.targets=[]"], "must not be empty"),
        (["lora.groups=[4]"], r"4 must be in 0 \.\. 3"),
        (["lora.targets=[attention]", "lora.groups=[1]"], "only experts have groups"),
        (["lora.rank=0"], "must be positive"),
        (["difficulty.probe_layer=2"], "both probe_layer and hidden_size"),
        (["difficulty.probe_layer=2", "difficulty.hidden_size=8"], "has a head of its own"),
    ],
)
def test_bad_recipes_are_one_error_that_names_the_key(
    start: Path, chats: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        recipe_for(start, chats, *overrides)
    assert "\n" not in str(error.value)


def test_a_frozen_teacher_without_a_starting_checkpoint_is_refused() -> None:
    overrides = ["stages.joint.teacher=frozen"]
    with pytest.raises(ValueError, match="teacher: frozen needs an initial_checkpoint"):
        load_recipe("train/pico.yaml", overrides)


def changed_copy(start: Path, folder: Path, **fields: Any) -> Path:
    """The starting checkpoint with other values in its config and no unfitting weights."""
    data = json.loads((start / "config.json").read_text()) | fields
    shutil.copytree(start, folder)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_a_checkpoint_of_one_tier_has_no_teacher_above(
    start: Path, chats: Path, tmp_path: Path
) -> None:
    data = json.loads((start / "config.json").read_text())
    one = changed_copy(start, tmp_path / "one", tiers=data["tiers"][-1:])
    with pytest.raises(ValueError, match="frozen needs a tier below the top"):
        recipe_for(one, chats, "stages.joint.num_tiers=1", "stages.joint.tier_weights=[]")


def test_a_checkpoint_without_a_head_gets_the_one_described(
    start: Path, chats: Path, tmp_path: Path
) -> None:
    bare = changed_copy(start, tmp_path / "bare", difficulty=None)
    with pytest.raises(ValueError, match="has no difficulty head: give"):
        recipe_for(bare, chats)
    described = ["difficulty.probe_layer=2", "difficulty.hidden_size=8"]
    config = recipe_for(bare, chats, *described).model_config()
    assert (config.difficulty.probe_layer, config.difficulty.hidden_size) == (2, 8)


def test_wrong_tokenizers_are_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"310 tokens, the model only 300: .* another model's"):
        load_tokenizer(start, 300)
    bare = tmp_path / "bare"
    shutil.copytree(start, bare)
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(bare, 320)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jinja"):
        load_tokenizer(start, 320, "nothing.jinja")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    plain = tmp_path / "plain"
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    loaded = load_tokenizer(plain, 320)
    assert loaded.pad_token == loaded.eos_token


def test_no_chat_template_and_bad_rows_are_refused_before_training(
    start: Path, chats: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(start, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chats\.jsonl:\d+: chat template: the tokenizer has no"):
        run(recipe_for(plain, chats), tmp_path / "run")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '\n{"messages": [{"role": "bot", "content": "x"}]}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:401: messages\[0\]\.role: 'bot'"):
        run(recipe_for(start, bad), tmp_path / "other")
    assert not (tmp_path / "run" / "training_state").exists()


def test_too_few_held_out_rows_are_refused_before_training(
    start: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(start, chats, "data.validation_fraction=0.1")
    with pytest.raises(ValueError, match="10 held-out tasks for fit; at least 30 are needed"):
        run(recipe, tmp_path)
    assert not (tmp_path / "training_state").exists()


def test_a_starting_checkpoint_that_changed_is_refused(
    start: Path, chats: Path, tmp_path: Path
) -> None:
    """Weights, config or tokenizer: the run that began on others does not go on."""
    copy = tmp_path / "copy"
    shutil.copytree(start, copy)
    names = fingerprint(copy)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names.keys()
    assert fingerprint(start) == names
    recipe = recipe_for(copy, tmp_path, f"data.files=[{{path: {chats}, format: chat}}]")
    out = tmp_path / "run"
    out.mkdir()
    _claim(out, recipe)
    _claim(out, recipe)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors changed since the run"):
        _claim(out, recipe)
    with pytest.raises(ValueError, match="another recipe"):
        _claim(out, recipe_for(copy, chats, "seed=3"))
