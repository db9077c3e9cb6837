"""The server's settings: strict, complete, and silent about keys."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dvpa.server.config import KEYS_VARIABLE, ServeConfig, load_serve_config, read_keys

SHIPPED = Path(__file__).resolve().parent.parent / "configs/serve/default.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_holds_every_setting_at_its_default(monkeypatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert load_serve_config(SHIPPED) == ServeConfig()
    named = yaml.safe_load(SHIPPED.read_text())
    assert set(named) == {item.name for item in fields(ServeConfig)} - {"api_keys"}
    engine = {item.name for item in fields(ServeConfig().engine)}
    assert set(named["engine"]) == engine


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 9000\ndrain_s: 5\nengine: {max_num_seqs: 4}\n")
    config = load_serve_config(path, port=9001, host=None)
    assert (config.port, config.drain_s, config.host) == (9001, 5, "127.0.0.1")
    assert (config.engine.max_num_seqs, config.engine.max_queue) == (4, 256)


def test_escalation_is_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, "engine: {escalation: {upper: 0.9, lower: 0.4}}\n")
    escalation = load_serve_config(path).engine.escalation
    assert escalation is not None
    assert (escalation.upper, escalation.lower) == (0.9, 0.4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key prot"),
        ("engine: {max_seqs: 1}", r"unknown key engine\.max_seqs"),
        ("engine: {escalation: {up: 1}}", r"engine\.escalation\.up"),
        ("engine: 5", "engine: 5 must be a mapping"),
        ("engine: {max_queue: 0}", r"engine\.max_queue: 0"),
        ("port: 70000", "port: 70000"),
        ("port: true", "port: True"),
        ("host: ''", "host: ''"),
        ("cors_origins: ['*']", r"cors_origins: '\*'"),
        ("cors_origins: all", "cors_origins: 'all' must be a list"),
        ("drain_s: -1", "drain_s: -1"),
        ("header_timeout_s: 0", "header_timeout_s: 0"),
        ("request_timeout_s: .nan", "request_timeout_s"),
        ("dtype: int8", "dtype: 'int8'"),
        ("dashboard: 1", "dashboard: 1"),
        ("api_keys: [abcdefgh]", "unknown key api_keys"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_serve_config(write(tmp_path, text))
    assert "serve.yaml" in str(caught.value) or "api_keys" in message or ":" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_come_from_file_and_environment_once_each(tmp_path: Path, monkeypatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key-1\n\nsecond-key-2  \nfirst-key-1\n")
    monkeypatch.setenv(KEYS_VARIABLE, "third-key-3, first-key-1")
    assert set(read_keys(str(keys))) == {"first-key-1", "second-key-2", "third-key-3"}
    config = load_serve_config(api_key_file=str(keys))
    assert len(config.api_keys) == 3
    assert "key-1" not in repr(config)


def test_a_weak_key_is_refused_without_being_shown(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with pytest.raises(ValueError, match="api_keys: a key of 6 characters") as caught:
        load_serve_config(api_key_file=str(keys))
    assert "secret" not in str(caught.value)


def test_a_missing_key_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        load_serve_config(api_key_file="nowhere/keys")
