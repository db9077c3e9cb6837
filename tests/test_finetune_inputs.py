"""Fine-tuning on what does not fit: every bad input is one error, before any training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_world import conversations, random_start, recipe_for, run
from transformers import AutoTokenizer

from dvpa_train.config import load_recipe
from dvpa_train.initial import fingerprint, load_tokenizer
from dvpa_train.main import _claim


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_start(tmp_path_factory.mktemp("start") / "checkpoint")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("data") / "chats.jsonl")


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
        (["strategy.kind=fsdp2"], "lora needs single or ddp, not fsdp2"),
        (
            [
                *("lora=null", "freeze=[router]", "stages.joint.teacher=in_place"),
                "strategy={kind: deepspeed, precision: bf16}",
            ],
            "bf16 with freeze needs kind fsdp2, not deepspeed",
        ),
        (["lora=null", "strategy.kind=deepspeed"], r"joint\.teacher: frozen needs single, ddp or"),
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
