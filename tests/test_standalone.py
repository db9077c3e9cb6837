"""Checkpoints load without dvpa: the bundled source, in a process that cannot import ours."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import left_padded, moe_layers, mtp_model, tiny_model

from dvpa.model import bundler
from dvpa.model.standalone import AUTO_MAP, CONFIGURATION_FILE, MODELING_FILE
from dvpa.tiers import TierMap

# What a process without dvpa sees: no finder gives it a package of ours.
PROGRAM = """
import sys
from pathlib import Path


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dvpa", "dvpa_kernels", "dvpa_train"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, again = Path(sys.argv[1]), Path(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    raise AssertionError("loaded without consent")
expected = torch.load(folder.parent / "expected.pt")


def check(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = {"input_ids": expected["input_ids"], "attention_mask": expected["attention_mask"]}
    with torch.no_grad():
        out = model(**inputs, tiers=expected["tiers"], use_cache=False, with_mtp=True)
    assert torch.equal(out.logits, expected["logits"])
    assert torch.equal(out.mtp_logits, expected["mtp_logits"])
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])
    assert model.tier_map.thresholds == (0.4, 0.5)


model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
check(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).tier_names[0] == "base"
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.num_tiers == 3
model.save_pretrained(again)
check(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True))
try:
    model.config.tier_index("huge")
except ValueError as error:
    assert "0=base" in str(error)
assert not [name for name in sys.modules if name.split(".")[0] in ("dvpa", "dvpa_kernels")]
"""


def test_a_process_without_dvpa(tmp_path: Path) -> None:
    model = mtp_model(tie_word_embeddings=True)
    costs = model.tier_map.costs
    model.tier_map = TierMap("threshold", ("base", "middle", "top"), costs, 2, (0.4, 0.5))
    model.save_pretrained(tmp_path / "checkpoint")
    for layer in moe_layers(model):
        layer.experts.backend = "torch"  # what the files without our kernels use
    batch = left_padded([7, 3])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    tiers = torch.tensor([0, 2])
    with torch.no_grad():
        out = model(**inputs, tiers=tiers, use_cache=False, with_mtp=True)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = {**inputs, "tiers": tiers, "tokens": tokens}
    expected |= {"logits": out.logits, "mtp_logits": out.mtp_logits}
    torch.save(expected, tmp_path / "expected.pt")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    # Keep a Transformers that was put first by PYTHONPATH, but none of ours.
    ours = ("dvpa", "dvpa_kernels", "dvpa_train")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in paths if not any(Path(path, name).exists() for name in ours)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in (CONFIGURATION_FILE, MODELING_FILE):
        written = (tmp_path / "again" / name).read_text()
        assert written == (tmp_path / "checkpoint" / name).read_text()


def test_the_folder_names_its_files(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        tree = ast.parse((tmp_path / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_worker_process_writes_no_side_files(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".py", ".json"}]


def test_the_bundle_is_deterministic_and_self_contained() -> None:
    bundler.bundle.cache_clear()
    files = bundler.bundle()
    bundler.bundle.cache_clear()
    assert bundler.bundle() == files
    for source in files.values():
        compile(source, "bundle", "exec")
        assert source.isascii()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] in bundler.ROOTS for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert node.module.split(".")[0] not in bundler.ROOTS
                assert node.level == 0 or node.module == CONFIGURATION_FILE[:-3]


def test_what_only_the_package_has_is_left_out(package: dict[str, str]) -> None:
    package["dvpa.kernels_of_ours"] = (
        "IS_PACKAGE = True\n"
        "def best(x):\n"
        "    if IS_PACKAGE:\n"
        "        from dvpa_kernels.cpu import quick\n"
        "        return quick(x)\n"
        "    return x + 1\n"
    )
    package["dvpa.model.causal_lm"] = "from dvpa.kernels_of_ours import IS_PACKAGE, best\n"
    files = bundler.bundle()
    assert "dvpa_kernels.cpu" not in files[MODELING_FILE]
    assert "IS_PACKAGE" not in files[MODELING_FILE]
    assert run(files)["best"](1) == 2  # type: ignore[operator]


def test_the_package_flag_is_only_asked_for_alone(package: dict[str, str]) -> None:
    package["dvpa.model.causal_lm"] = "IS_PACKAGE = True\nbest = 1 if IS_PACKAGE else 2\n"
    with pytest.raises(ValueError, match=r"dvpa.model.causal_lm:2: ask `if IS_PACKAGE:`"):
        bundler.bundle()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Sources that stand in for ours: module -> text."""
    sources: dict[str, str] = {"dvpa.config": "class DvpaConfig: ...\n"}
    monkeypatch.setattr(bundler, "_source", sources.__getitem__)
    bundler.bundle.cache_clear()
    yield sources
    bundler.bundle.cache_clear()


def run(files: dict[str, str]) -> dict[str, object]:
    """Execute a bundle and return the names of its second file."""
    space: dict[str, object] = {}
    modeling = files[MODELING_FILE].replace(f"from .{CONFIGURATION_FILE[:-3]} import", "#")
    exec(files[CONFIGURATION_FILE], space)
    exec(modeling, space)
    return space


def test_needs_come_first_and_once(package: dict[str, str]) -> None:
    package["dvpa.ops"] = '"""Notes."""\nimport os\n\nBASE = 1\n'
    package["dvpa.model.experts"] = "from dvpa.ops import BASE\nTWICE = 2 * BASE\n"
    package["dvpa.model.causal_lm"] = (
        "from dvpa.config import DvpaConfig\n"
        "from dvpa.ops import BASE\n"
        "from dvpa.model.experts import TWICE\n"
        "ALL = (DvpaConfig, BASE, TWICE)\n"
    )
    files = bundler.bundle()
    assert files[MODELING_FILE].count("BASE = 1") == 1
    assert "# Notes." in files[MODELING_FILE]
    space = run(files)
    assert space["ALL"] == (space["DvpaConfig"], 1, 2)


def test_private_names_of_two_modules_are_kept_apart(package: dict[str, str]) -> None:
    package["dvpa.ops"] = "def _size(n):\n    return n\n\ndef a():\n    return _size(1)\n"
    package["dvpa.model.causal_lm"] = (
        "from dvpa.ops import a\n\n"
        "def _size(n):\n    return [10 * n for _ in 'x'][0]\n\n"
        "class B:\n    def _size(self):\n        return _size(2)\n\n"
        "RESULT = (a(), B()._size(), f'{_size(3)}')\n"
    )
    assert run(bundler.bundle())["RESULT"] == (1, 20, "30")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from dvpa.ops import a\ndef a(): return 2\n", "a: bound differently in dvpa.ops"),
        ("from dvpa.ops import a as b\n", "import ours by full, unchanged name"),
        ("from dvpa.ops import *\n", "import ours by full, unchanged name"),
        ("from .ops import a\n", "import ours by full, unchanged name"),
        ("import dvpa.ops\n", "write `from ... import ...`"),
        ("from dvpa.ops import a\nfrom math import a\n", "a: bound differently"),
        ("from dvpa.ops import a\ndef _b(): ...\ndef c(_b): ...\n", "_b: both an argument"),
    ],
)
def test_what_would_break_is_refused(package: dict[str, str], source: str, message: str) -> None:
    package["dvpa.ops"] = "def a(): ...\ndef _b(): return 1\n"
    package["dvpa.model.causal_lm"] = source
    with pytest.raises(ValueError, match=message):
        bundler.bundle()
