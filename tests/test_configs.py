"""Every shipped YAML parses, strictly, and explains each of its keys."""

import re
from pathlib import Path

import pytest
import yaml

from dvpa.config import find_config, load_model_config, load_yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EVERY = sorted(CONFIGS.rglob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
KEY = re.compile(r"^\s*(?:- )?([A-Za-z_][\w.-]*):(\s|$)")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def uncommented(text: str) -> list[str]:
    """Keys in block style with a comment neither on their line nor on the line above."""
    found, above = [], ""
    for line in text.splitlines():
        match = KEY.match(line)
        if match and " # " not in line and not above.strip().startswith("#"):
            found.append(match.group(1))
        above = line
    return found


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_file_parses_and_comments_every_key(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(load_yaml(path), dict)
    assert uncommented(text) == []
    assert text.isascii()


def test_a_missing_comment_is_caught() -> None:
    assert uncommented("a: 1  # why\nb: 2\n# why\nc: 3\nd:\n  e: 4\n") == ["b", "d", "e"]


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_model_config_loads_strictly(path: Path, tmp_path: Path) -> None:
    config = load_model_config(path)
    assert config.num_tiers >= 2
    assert config.difficulty is not None
    data = yaml.safe_load(path.read_text())
    copy = tmp_path / "model.yaml"
    copy.write_text(yaml.safe_dump({**data, "num_hiden_layers": 2}))
    with pytest.raises(ValueError, match="num_hiden_layers"):
        load_model_config(copy)


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_model_config_names_only_what_it_sets(path: Path) -> None:
    """A value in the file is the value of the config: nothing is silently replaced."""
    config = load_model_config(path)
    for key, value in load_yaml(path).items():
        if key not in {"tiers", "difficulty"}:
            assert getattr(config, key) == value, key


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=name_of)
def test_train_config_names_a_shipped_model(path: Path) -> None:
    model = load_yaml(path).get("model")
    if not isinstance(model, str):
        pytest.skip("this recipe does not name a model file")
    load_model_config(model)


def test_config_is_found_by_short_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("model/pico.yaml") == CONFIGS / "model" / "pico.yaml"
    assert find_config("configs/model/pico.yaml") == CONFIGS / "model" / "pico.yaml"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        find_config("nowhere.yaml")
