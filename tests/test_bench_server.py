"""The server's benchmarks: what they make of bytes and numbers. Times are not judged here."""

import json
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
bench_server = import_module("bench_server")
overload_server = import_module("overload_server")
server_crowd = import_module("server_crowd")
server_load = import_module("server_load")
server_page = import_module("server_page")

PICO = ROOT / "configs" / "model" / "pico.yaml"


def answer_of(raw: bytes, **fields: Any) -> Any:
    answer = server_load.Answer(times=[1.0], **fields)
    answer.take(raw)
    return answer


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\r\n\r\n"


WORD = event(choices=[{"text": "hi ", "finish_reason": None}])
LAST = event(choices=[{"text": "you", "finish_reason": "length"}])
USAGE = event(choices=[], usage={"completion_tokens": 2})
DONE = b"data: [DONE]\n\n"


def test_a_stream_is_read_from_its_bytes() -> None:
    answer = answer_of(chunked(WORD, b": ping\r\n\r\n", LAST + USAGE[:9], USAGE[9:] + DONE))
    assert (answer.status, answer.text, answer.completion_tokens) == (200, "hi you", 2)
    assert answer.finish_reasons == ["length"] and answer.is_whole and not answer.is_truncated


@pytest.mark.parametrize(
    "raw",
    [
        chunked(WORD, end=b""),
        chunked(WORD, LAST, DONE, end=b""),
        chunked(WORD, LAST),
        chunked(WORD, DONE),
        chunked(WORD)[:-12],
        b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"choices": [',
    ],
)
def test_an_answer_without_its_end_is_truncated(raw: bytes) -> None:
    assert answer_of(raw).is_truncated
    assert not answer_of(raw, has_left=True).is_truncated


def test_an_answer_that_never_came() -> None:
    assert answer_of(b"").status == answer_of(b"HTTP/1.1 200").status == 0


def test_books_of_the_clients() -> None:
    ledger = server_crowd.Ledger()
    refused = b"HTTP/1.1 429 Too Many\r\ncontent-length: 0\r\n"
    ledger.take(answer_of(chunked(WORD, LAST, DONE)))
    ledger.take(answer_of(chunked(WORD, end=b""), has_left=True))
    ledger.take(answer_of(chunked(WORD, end=b"")))
    ledger.take(answer_of(refused + b"retry-after: 1\r\n\r\n"))
    ledger.take(answer_of(b""))
    assert ledger.wrong == []
    ledger.take(answer_of(refused + b"\r\n"))
    ledger.take(answer_of(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n"))
    assert [text.split(":")[0] for text in ledger.wrong] == [
        "429 without Retry-After",
        "status 500",
    ]
    assert (ledger.sent, ledger.answered, ledger.left, ledger.truncated) == (7, 1, 1, 1)
    assert (ledger.unconnected, ledger.refused, ledger.let_in) == (1, Counter({429: 2}), 3)


def test_the_servers_books_are_held_against_them() -> None:
    ledger = server_crowd.Ledger(sent=9, answered=4, left=2, refused=Counter({429: 3}))
    before = {'dvpa_requests_total{finish_reason="length"}': 10.0, "dvpa_num_requests_running": 0.0}
    after = {
        'dvpa_requests_total{finish_reason="length"}': 14.0,
        'dvpa_requests_total{finish_reason="cancelled"}': 2.0,
        'dvpa_requests_rejected_total{reason="queue_full"}': 3.0,
        "dvpa_num_requests_running": 0.0,
        "dvpa_kv_cache_usage_perc": 0.0,
    }
    assert overload_server.check_books(before, after, ledger) == []
    wrong = {
        'dvpa_requests_total{finish_reason="cancelled"}': 3.0,
        'dvpa_requests_total{finish_reason="error"}': 1.0,
        'dvpa_requests_rejected_total{reason="queue_full"}': 2.0,
        "dvpa_kv_cache_usage_perc": 0.1,
    }
    assert len(overload_server.check_books(before, {**after, **wrong}, ledger)) == 5


def sample(contender: str, number: int, wall: float, **more: Any) -> dict[str, Any]:
    row = {"contender": contender, "round": number, "concurrency": 8, "tokens": 100}
    return {**row, "wall_s": wall, "cpu_s": wall, "others": 0.0, "ttft_ms": 5.0, **more}


def samples() -> list[dict[str, Any]]:
    found = []
    for number, (alone, server) in enumerate([(1.0, 1.25), (2.0, 2.0), (1.0, 2.0)]):
        found += [
            sample(bench_server.GENERATE, number, alone, texts=["a", "b"]),
            sample(bench_server.STREAM, number, alone, texts=["a", "b"]),
            sample(bench_server.HTTP, number, server, texts=["a", "c"], client_cpu_s=0.1),
        ]
    return found


def test_throughput_lost_is_the_median_of_the_rounds() -> None:
    rows = bench_server.summarise(samples()[::-1])
    assert [row["contender"] for row in rows] == list(bench_server.CONTENDERS)
    lost = rows[-1]["throughput_lost"][bench_server.STREAM]
    assert lost == {"median": pytest.approx(0.2), "lowest": 0.0, "highest": 0.5}
    assert rows[-1]["tok_s"] == 50.0 and rows[-1]["client_cpu_ms_per_token"] == pytest.approx(1.0)
    assert not rows[-1]["is_disturbed"]


def test_texts_are_held_against_the_engines() -> None:
    assert bench_server.same_texts(samples()) == 0.5


def test_pages() -> None:
    result = {
        "model": {"total_params": 5e8, "config": "bench-500m.yaml"},
        "same_texts": 1.0,
        "rows": bench_server.summarise(samples()),
        **dict.fromkeys(("threads", "input", "output", "rounds"), 2),
    }
    text, head, rows = server_page.overhead_part(result)
    assert "bench-500m.yaml" in text and all(len(row) == len(head) for row in rows)
    assert rows[-1][3] == "20.0% (0.0% .. 50.0%)" and rows[0][3] == ""
    ledger = server_crowd.Ledger(sent=3, answered=3, refused=Counter({429: 7}))
    ledger.first_ms = ledger.total_ms = [1.0, 2.0, 3.0]
    load = {
        **ledger.row(),
        **dict.fromkeys(("minutes", "clients", "growth_mib"), 1),
        **dict.fromkeys(("capacity_requests_per_s", "offered_requests_per_s"), 1.0),
        "let_in_requests_per_s": 1.0,
        "health_ms": {"asked": 9, **server_crowd.percentiles([1.0, 2.0])},
    }
    stopped = {**ledger.row(), "ended_after_s": 1.0, "drain_s": 30.0, "exit_code": 0}
    killed = {"ready_after_s": 1.0, "same_answer": True}
    result = {"load": load, "sigterm": stopped, "kill": killed, "problems": ["too slow"]}
    text = server_page.overload_text({**result, "overload": 5, "max_num_seqs": 1, "max_queue": 2})
    assert "7 refused by the bounded queue (429)" in text and "Problems: too slow." in text


@pytest.mark.slow
def test_whole_runs_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "server.json"
    command = (
        f"bench_server.py --rounds 1 --threads 1 --attempts 1 --concurrency 1 2 --model {PICO}"
    )
    monkeypatch.setattr(sys, "argv", f"{command} --input 8 --output 6 --out {out}".split())
    bench_server.main()
    result = json.loads(out.read_text())
    assert result["same_texts"] == 1.0
    assert len(result["rows"]) == 6
    command = "overload_server.py --minutes 0.1 --clients 120 --capacity-seconds 3"
    monkeypatch.setattr(sys, "argv", f"{command} --out {out}".split())
    code = overload_server.main()
    result = json.loads(out.read_text())
    # A machine that others use may be slow; everything else has to hold.
    problems = [p for p in result["problems"] if "/health" not in p and "offered" not in p]
    assert problems == [] and code == bool(result["problems"])
    assert result["load"]["refused"].get("429", 0) > 0 and result["load"]["left_by_client"] > 0
