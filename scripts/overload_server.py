"""Far more clients than the server can serve, then SIGTERM, then kill -9: what do they see?

    python scripts/overload_server.py [--minutes 3] [--overload 5] [--clients 200]

A random small model behind `dvpa serve` on one thread. First its capacity is measured; then clients
offer `overload` times that rate, a third of them cutting the connection in the middle of every
stream, while a process of its own asks for /health. Then, each time under load: SIGTERM, and
kill -9 with a restart. Ends with status 1 if anything was lost, cut off, counted wrongly, refused
in another way than 429 or 503, held at the end, or slow where it must not be.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kernel_timing import describe_machine, describe_versions
from server_crowd import MODEL_NAME, Ledger, crowd, percentiles, write_checkpoint
from server_load import ROOT, Server, fetch, post, total

MAX_QUEUE = 64
MAX_SEQS = 16
LEAVERS = 3  # every third client leaves every stream early
DRAIN_SECONDS = 30.0
WARM_UP_SHARE = 0.25  # memory is judged from then on: caches have filled
GROWTH_MIB = 16.0
HEALTH_P99_MS = 100.0
OFFERED_SHARE = 0.9  # of the promised overload, at the least, or nothing was shown
SETTINGS = {
    "model_name": MODEL_NAME,
    "drain_s": DRAIN_SECONDS,
    "engine": {
        "max_queue": MAX_QUEUE,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": 64,
        "page_size": 8,
    },
}
QUESTION = {"prompt": "what is 1 + 1 ?", "max_tokens": 24, "temperature": 0}
Row = dict[str, Any]


def capacity(port: int, seconds: float) -> float:
    """Requests per second with as many clients as never let the queue run dry or over."""
    ledger = Ledger()
    start = time.perf_counter()
    asyncio.run(crowd(port, 2 * MAX_SEQS, ledger, seconds=seconds, rate=None))
    if ledger.wrong or ledger.answered != ledger.sent:
        raise RuntimeError(f"not all answered: {ledger.row()} {ledger.wrong[:3]}")
    return ledger.answered / (time.perf_counter() - start)


def ask_health(port: int, seconds: float, output: Path) -> None:
    """GET /health again and again on new connections; the times go to a file."""
    start, times, failures = time.perf_counter(), list[float](), 0
    while time.perf_counter() - start < seconds:
        asked = time.perf_counter()
        try:
            failures += fetch(port, "/health")[0] != 200
        except (OSError, http.client.HTTPException):
            failures += 1
        times.append(1e3 * (time.perf_counter() - asked))
        time.sleep(0.05)
    output.write_text(json.dumps({"asked": len(times), "failures": failures, **percentiles(times)}))


async def watch_memory(server: Server, samples: list[tuple[float, float]]) -> None:
    """Memory of the server every two seconds, until cancelled."""
    start = time.perf_counter()
    while True:
        samples.append((time.perf_counter() - start, server.resident_mib()))
        await asyncio.sleep(2.0)


def overload(
    server: Server, folder: Path, arguments: argparse.Namespace, problems: list[str]
) -> Row:
    """The long phase: clients, /health from elsewhere, memory, and the books at the end."""
    per_second = capacity(server.port, arguments.capacity_seconds)
    rate, seconds = arguments.overload * per_second, 60 * arguments.minutes
    before, ledger, memory = settled(server), Ledger(), list[tuple[float, float]]()
    out = folder / "health.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--ask-health"]
    asking = subprocess.Popen([*command, str(server.port), str(seconds), str(out)])

    async def run() -> None:
        watching = asyncio.create_task(watch_memory(server, memory))
        await crowd(
            server.port,
            arguments.clients,
            ledger,
            seconds=seconds,
            rate=rate,
            leavers=LEAVERS,
        )
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    asyncio.run(run())
    offered = ledger.sent / seconds
    asking.wait(60)
    health = json.loads(out.read_text())
    after = settled(server)
    warm = [mib for at, mib in memory if at > WARM_UP_SHARE * seconds]
    growth = warm[-1] - warm[0] if warm else 0.0
    problems += ledger.wrong[:20]
    if ledger.truncated:
        problems.append(f"{ledger.truncated} answers were cut off")
    if ledger.unconnected:
        problems.append(f"{ledger.unconnected} connections failed")
    if offered < OFFERED_SHARE * rate:
        problems.append(f"the clients offered {offered:.0f} requests/s, not {rate:.0f}")
    if health["failures"]:
        problems.append(f"/health failed {health['failures']} times")
    if health["p99"] > HEALTH_P99_MS:
        problems.append(f"p99 of /health is {health['p99']:.0f} ms")
    if growth > GROWTH_MIB:
        problems.append(f"memory grew by {growth:.1f} MiB")
    problems += check_books(before, after, ledger)
    shown = memory[:: max(1, len(memory) // 60)]
    return {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "capacity_requests_per_s": per_second,
        "offered_requests_per_s": offered,
        "let_in_requests_per_s": ledger.let_in / seconds,
        **ledger.row(),
        "server_finish_reasons": {
            reason: grown(before, after, "requests_total", f'finish_reason="{reason}"')
            for reason in ("stop", "length", "cancelled", "timeout", "error")
        },
        "health_ms": health,
        "memory_mib": [[round(at, 1), round(mib, 1)] for at, mib in shown],
        "growth_mib": growth,
    }


def settled(server: Server) -> dict[str, float]:
    """Metrics once nothing runs or waits any more, or after ten seconds."""
    for _ in range(100):
        found = server.metrics()
        if not any(total(found, f"dvpa_num_requests_{kind}") for kind in ("running", "waiting")):
            break
        time.sleep(0.1)
    return found


def grown(before: dict[str, float], after: dict[str, float], name: str, label: str = "") -> int:
    """By how much a counter grew."""
    return round(total(after, f"dvpa_{name}", label) - total(before, f"dvpa_{name}", label))


def check_books(before: dict[str, float], after: dict[str, float], ledger: Ledger) -> list[str]:
    """What the server counted against what the clients saw, and what it still holds."""
    problems = []
    finished = grown(before, after, "requests_total")
    if finished != ledger.let_in:
        problems.append(f"{ledger.let_in} requests were let in, the server counted {finished}")
    cancelled = grown(before, after, "requests_total", 'finish_reason="cancelled"')
    if cancelled > ledger.left:
        problems.append(f"{cancelled} were cancelled, {ledger.left} clients left")
    if failed := grown(before, after, "requests_total", 'finish_reason="error"'):
        problems.append(f"{failed} requests ended with an error")
    refused = grown(before, after, "requests_rejected_total")
    if refused != ledger.refused.total():
        problems.append(
            f"clients were refused {ledger.refused.total()} times, the server counted {refused}"
        )
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if held := total(after, f"dvpa_{name}"):
            problems.append(f"at the end {name} is {held:g}")
    return problems


def under_load(server: Server, number: int) -> tuple[Ledger, float, int]:
    """Send a signal to the loaded server: what clients saw, seconds until it ended, exit code."""
    ledger = Ledger()

    async def run() -> tuple[float, int]:
        load = asyncio.create_task(
            crowd(server.port, MAX_QUEUE, ledger, seconds=2 * DRAIN_SECONDS, rate=None)
        )
        await asyncio.sleep(3.0)
        start = time.perf_counter()
        server.signal(number)
        code = await asyncio.to_thread(server.wait)
        took = time.perf_counter() - start
        await load
        return took, code

    took, code = asyncio.run(run())
    return ledger, took, code


def terminate(server: Server, problems: list[str]) -> Row:
    """SIGTERM: everything that was let in is answered in full."""
    ledger, took, code = under_load(server, signal.SIGTERM)
    problems += [f"SIGTERM: {problem}" for problem in ledger.wrong[:5]]
    if ledger.truncated:
        problems.append(f"SIGTERM: {ledger.truncated} answers were cut off")
    if cut := ledger.reasons["cancelled"]:
        problems.append(f"SIGTERM: {cut} requests were cancelled within the drain time")
    if code != 0:
        problems.append(f"SIGTERM: exit code {code}")
    if took > DRAIN_SECONDS:
        problems.append(f"SIGTERM: ended after {took:.1f} s, may take {DRAIN_SECONDS:g}")
    return {"exit_code": code, "ended_after_s": took, "drain_s": DRAIN_SECONDS, **ledger.row()}


def crash(server: Server, problems: list[str]) -> Row:
    """kill -9 and a start on the same port: ready, and the same answers as before."""

    def ask() -> str:
        return asyncio.run(post(server.port, "/v1/completions", QUESTION)).text

    server.start()
    known = ask()
    ledger, _, code = under_load(server, signal.SIGKILL)
    ready_s = server.start()
    is_same = ask() == known != ""
    if not is_same:
        problems.append("kill -9: another answer after the restart")
    if code != -signal.SIGKILL:
        problems.append(f"kill -9: exit code {code}")
    if (code := server.stop()) != 0:
        problems.append(f"after the restart: exit code {code}")
    return {"ready_after_s": ready_s, "same_answer": is_same, "cut_off": ledger.truncated}


def main() -> int:
    """All phases, the JSON, the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--overload", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/server_overload.json")
    parser.add_argument("--ask-health", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask_health:
        port, seconds, output = arguments.ask_health
        ask_health(int(port), float(seconds), Path(output))
        return 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoint")
        server = Server(folder / "checkpoint", folder, **SETTINGS)
        try:
            found = {
                "ready_after_s": server.start(),
                "load": overload(server, folder, arguments, problems),
                "sigterm": terminate(server, problems),
                "kill": crash(server, problems),
            }
        finally:
            server.kill()
    result = {
        "benchmark": "server_overload",
        "overload": arguments.overload,
        "max_queue": MAX_QUEUE,
        "max_num_seqs": MAX_SEQS,
        **found,
        "problems": problems,
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    del result["load"]["memory_mib"]
    print(json.dumps(result, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
