"""`import dvpa` and Transformers' Auto classes, in either order, each in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import left_padded, tiny_model

import dvpa
from dvpa.model import DvpaForCausalLM, DvpaModel
from dvpa.registration import _HOOK, register

CONFIG = (
    "vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, "
    "num_hidden_layers=2, num_attention_heads=1, n_routed_experts=8, n_group=2, kv_lora_rank=8, "
    "num_experts_per_tok=2, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4"
)
PROGRAMS = {
    "dvpa first": (
        "import sys, dvpa\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.for_model('dvpa', {CONFIG})\n"
        "assert type(config).__module__ == 'dvpa.config'\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        # Transformers reads this to see that local code exists, before a stand-in is first used.
        "stand_in = AutoModelForCausalLM._model_mapping[type(config)]\n"
        "assert not stand_in.__module__.startswith('transformers.')\n"
        "assert 'dvpa.model' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "assert type(model) is sys.modules['dvpa.model'].DvpaForCausalLM\n"
        "assert type(AutoModel.from_config(config)) is sys.modules['dvpa.model'].DvpaModel\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)] is type(model)\n"
    ),
    "transformers first": (
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "import dvpa\n"
        f"config = AutoConfig.for_model('dvpa', {CONFIG})\n"
        "assert type(AutoModelForCausalLM.from_config(config)) is dvpa.DvpaForCausalLM\n"
    ),
    # These import AutoModel while they are only half imported themselves.
    "layers in between": "import dvpa, transformers.modeling_layers\nimport dvpa.model\n",
    "generation in between": (
        "import dvpa\nfrom transformers import GenerationMixin\nimport dvpa.model\n"
    ),
    "model first": (
        "import dvpa.model, transformers\n"
        f"config = transformers.AutoConfig.for_model('dvpa', {CONFIG})\n"
        "model = transformers.AutoModelForCausalLM.from_config(config)\n"
        "assert type(model) is dvpa.model.DvpaForCausalLM\n"
    ),
}
NO_TORCH = (
    "import sys, dvpa, dvpa.pricing, dvpa.tiers, dvpa.tasks\n"
    "dvpa.TierMap, dvpa.Policy, dvpa.price\n"
    "assert not {'torch', 'transformers'} & set(sys.modules)\n"
)

# What Transformers needs of others is imported once, and the orders are forked from there.
DRIVER = """
import json, os, sys, traceback
import scipy.optimize, torch, torch._dynamo, torch.distributed.tensor
assert "transformers" not in sys.modules

failed = []
for order, program in json.loads(sys.stdin.read()).items():
    child = os.fork()
    if child == 0:
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(order)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def run(folder: Path, program: str, text: str = "") -> None:
    """Run a program in a fresh interpreter; fail with its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=text,
        capture_output=True,
        text=True,
        env=dict(os.environ),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr


def test_any_order_of_imports(tmp_path: Path) -> None:
    run(tmp_path, DRIVER, json.dumps(PROGRAMS))


def test_the_light_parts_load_neither_torch_nor_transformers(tmp_path: Path) -> None:
    run(tmp_path, NO_TORCH)


def test_registering_again_changes_nothing() -> None:
    from transformers import AutoModelForCausalLM

    from dvpa.config import DvpaConfig

    before = AutoModelForCausalLM._model_mapping[DvpaConfig]
    hooks = list(sys.meta_path)
    register()
    register()
    assert AutoModelForCausalLM._model_mapping[DvpaConfig] is before
    assert sys.meta_path == hooks
    assert hooks.count(_HOOK) <= 1


def test_auto_classes_load_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tier_names == ["base", "middle", "top"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DvpaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DvpaModel


def test_installed_code_wins_over_the_checkpoints_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "modeling_dvpa.py").write_text("raise AssertionError('remote code ran')\n")
    for trust in (None, True, False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model) is DvpaForCausalLM


def test_pipeline(tmp_path: Path) -> None:
    from transformers import pipeline

    from dvpa.tasks.tokenizer import train_tokenizer

    lines = ["one and two", "two and three 123", "three and four = seven"] * 5
    tokenizer = train_tokenizer(lines, 300)
    from helpers import tiny_config

    model = tiny_model(
        tiny_config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model) is DvpaForCausalLM
    batch = ["one and", "two and three"]
    texts = generator(
        batch, max_new_tokens=4, do_sample=False, return_full_text=False, batch_size=2
    )
    for prompt, text in zip(batch, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=4, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        assert text[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_public_names() -> None:
    for name in dvpa.__all__:
        assert getattr(dvpa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dvpa.Nothing


def test_accelerated_attention_is_offered() -> None:
    """The attention interface of Transformers is used, so its implementations are selectable."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    batch = left_padded([4])
    assert model(batch.input_ids, tiers=0).logits.shape == (1, 4, 64)
