"""Traffic changes, the server says so, `dvpa calibrate --on-logs` meets the budget again.

A trained pico, `dvpa serve` in a process of its own, requests over HTTP, and nothing but what the
server wrote.
"""

import json
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from routed_world import CALM, SHIFTED, questions, routed_model, write_checkpoint
from server_world import Process, until

from dvpa.cli import main
from dvpa.evaluate.outcomes import collect_outcomes
from dvpa.evaluate.server_logs import read_server_logs
from dvpa.pricing import price
from dvpa.tasks import Task
from dvpa.tiers.tier_map import TierMap

pytestmark = pytest.mark.slow
BUDGET = 0.75  # of the top tier
REQUESTS = 400  # of a fixed mix; with 600 that the map is calibrated on, 5 % is 4 standard errors


def test_the_model_is_what_it_is_taken_for() -> None:
    model, tokenizer = routed_model()
    tasks = questions((1, 1, 1, 1), 200, 5)
    table = collect_outcomes(model, tokenizer, tasks)
    for level in range(4):
        right = table.quality[table.level == level].mean(axis=0)
        can = [float(tier >= level) if level < 3 else 0.0 for tier in range(3)]
        np.testing.assert_allclose(right, can, atol=0.3)
    assert np.corrcoef(table.difficulty, table.level)[0, 1] > 0.7


def send(server: Process, tasks: Sequence[Task], at_a_time: int = 8) -> None:
    """Greedy ones."""

    def ask(task: Task) -> None:
        body = {"prompt": task.question, "max_tokens": 6, "temperature": 0}
        reply = server.post("/v1/completions", **body)
        content = reply.rest()
        assert reply.status == 200, content

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(ask, tasks))


def drift(server: Process) -> float:
    """As the server reports it, over its window of the newest requests."""
    found: float = json.loads(server.get("/v1/dvpa/telemetry")[1])["difficulty"]["drift"]
    return found


def spent(log: Path, last: int) -> float:
    """Mean activated parameters per token of the newest requests, of the top tier's."""
    model, _ = routed_model()
    activated = [tier.activated_params for tier in price(model.config).tiers]
    found = read_server_logs([log], 3, last)
    per_request = np.asarray(activated)[found.tier] * found.tokens
    return float(per_request.sum() / found.tokens.sum() / activated[-1])


@pytest.mark.parametrize("shadow_share", [0.0, 1.0], ids=["kept curves", "shadow outcomes"])
def test_drift_is_detected_and_recalibration_restores_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shadow_share: float
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"question": t.question, "answer": t.answer} for t in questions(CALM, 2000, 1)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["calibrate", str(checkpoint), "--budget", f"{BUDGET:.0%}", "--kind", "threshold"]
    assert main([*argv, "--tasks", str(tasks), "--no-nll"]) == 0
    assert abs(json.loads((checkpoint / "calibration/report.json").read_text())
               ["calibration"]["budget"]["deviation"]) < 0.05  # fmt: skip
    server = Process(tmp_path, checkpoint, shadow_share=shadow_share)
    log = tmp_path / "server.log"
    try:
        server.ready()
        send(server, questions(CALM, REQUESTS, 2))
        assert spent(log, REQUESTS) == pytest.approx(BUDGET, rel=0.05)
        assert drift(server) < 0.1

        # One shadow runs at a time, among clients' requests: eight of those leave it every twelfth.
        send(server, questions(SHIFTED, 500, 3), at_a_time=2 if shadow_share else 8)
        assert drift(server) > 0.25
        assert spent(log, 500) > 1.05 * BUDGET

        if shadow_share:
            until(lambda: server.log.count('"event": "shadow"') > 100, "shadow outcomes")
        capsys.readouterr()
        assert main([*argv, "--on-logs", str(log), "--last", "500"]) == 0
        printed = capsys.readouterr().out
        assert "another mix" in printed
        assert ("curves    shadow outcomes" in printed) is bool(shadow_share)
        before = TierMap.load(checkpoint / "tier_map.json")
        assert before.statistics is not None and before.statistics["num_traffic"] == 500
        server.signal(signal.SIGHUP)
        until(lambda: "tier map reloaded" in server.log, "a reload")

        send(server, questions(SHIFTED, 500, 4))
        assert spent(log, 500) == pytest.approx(BUDGET, rel=0.05)
        assert drift(server) < 0.1
    finally:
        server.kill()
