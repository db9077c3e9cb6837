"""Locust's users at `dvpa serve`, for minutes: rates and times of each kind of request.

    pip install locust
    python scripts/bench_locust.py CHECKPOINT [--users 32] [--minutes 2]

The server runs in a process of its own on the same machine, and so does locust
(scripts/locustfile.py): users of every kind, who read the whole answer and think for a moment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kernel_timing import describe_machine, describe_versions
from server_load import HOST, ROOT, Server

PERCENTILES = (0.5, 0.95, 0.99)


def rows(stats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of request, from locust's own JSON."""
    found = []
    for kind in stats:
        times = sorted((float(ms), int(count)) for ms, count in kind["response_times"].items())
        seconds = kind["last_request_timestamp"] - kind["start_time"]
        found.append(
            {
                "name": kind["name"],
                "requests": kind["num_requests"],
                "failures": kind["num_failures"],
                "per_s": kind["num_requests"] / seconds,
                "ms": {f"p{100 * share:g}": percentile(times, share) for share in PERCENTILES},
            }
        )
    return found


def percentile(times: list[tuple[float, int]], share: float) -> float:
    """Of a histogram (value, count), in order."""
    left = share * sum(count for _, count in times)
    for value, count in times:
        left -= count
        if left <= 0:
            return value
    return times[-1][0]


def main() -> None:
    """Load the server and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/server_locust.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.checkpoint, Path(folder), arguments.threads)
        server.start()
        try:
            done = subprocess.run(
                [
                    sys.executable, "-m", "locust", "-f", str(ROOT / "scripts/locustfile.py"),
                    "--host", f"http://{HOST}:{server.port}", "--headless", "--json",
                    "-u", str(arguments.users), "-r", "8", "-t", f"{60 * arguments.minutes:g}s",
                ],
                capture_output=True,
                text=True,
            )  # fmt: skip
        finally:
            server.stop()
    if not done.stdout.strip():
        raise SystemExit(done.stderr[-2000:])
    result = {
        "benchmark": "server_locust",
        "users": arguments.users,
        "minutes": arguments.minutes,
        "threads": arguments.threads,
        "checkpoint": json.loads((arguments.checkpoint / "config.json").read_text())["model_type"],
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
        "rows": rows(json.loads(done.stdout)),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"], indent=1))


if __name__ == "__main__":
    main()
