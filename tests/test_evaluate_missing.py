"""`dvpa evaluate` where lm-eval is not installed."""

import sys

import pytest
from server_world import checkpoint
from test_cli import fails


def test_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "dvpa.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    message = fails(capsys, "evaluate", checkpoint(), "--tasks", "task.yaml")
    assert "pip install 'dvpa[eval]'" in message
