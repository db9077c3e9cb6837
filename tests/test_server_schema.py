"""The OpenAPI document against the server: schemathesis on every operation, every check.

A short run among the fast tests; a long one with random bodies, where DVPA_FUZZ is set (`-m slow`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_world import World, serving

pytest.importorskip("schemathesis", reason="schemathesis is not installed")

KEY = "a-key-for-the-fuzzer"
# Fields that only fail together (min_tier above max_tier, n without room, a prompt longer than the
# context) are beyond JSON Schema: a 400 is a right answer to a body that each field allows.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = [
    "2xx", "400", "401", "403", "404", "409", "429", "503",
]
"""


def fuzz(world: World, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis against the server."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = Path(sys.executable).parent / "schemathesis"
    found = str(command) if command.exists() else shutil.which("schemathesis")
    assert found, "its command is beside this Python"
    return subprocess.run(
        [
            found, "run", f"{world.url}/openapi.json",
            "--header", f"Authorization: Bearer {KEY}",
            "--seed", "1", "--no-color", *options,
        ],
        cwd=folder, capture_output=True, text=True, timeout=900,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "COLUMNS": "160"},
    )  # fmt: skip


def check(folder: Path, *options: str) -> None:
    settings: dict[str, Any] = {"api_keys": (KEY,), "max_output_tokens": 32, "max_n": 4}
    with serving(**settings) as world:
        done = fuzz(world, folder, *options)
        counts = world.metrics()
        world.idle()
    errors = {name: n for name, n in counts.items() if 'reason="internal_error"' in name}
    assert not any(errors.values()), errors
    (folder / "found.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]


def test_a_short_fuzz_finds_nothing(tmp_path: Path) -> None:
    check(tmp_path, "--phases", "examples,coverage", "--workers", "2")


@pytest.mark.slow
@pytest.mark.skipif(
    "DVPA_FUZZ" not in os.environ, reason="minutes: DVPA_FUZZ=N for N bodies per operation"
)
def test_a_long_fuzz_finds_nothing(tmp_path: Path) -> None:
    examples = os.environ["DVPA_FUZZ"]
    check(tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", examples)
