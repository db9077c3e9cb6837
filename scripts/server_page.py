"""The server benchmarks' part of docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Part = tuple[str, list[str], list[list[str]]]


def overhead_part(result: Row) -> Part:
    """(text, head, rows) of `scripts/bench_server.py`."""
    model = result["model"]
    text = (
        f"`python scripts/bench_server.py`: a random model of {model['total_params'] / 1e6:.0f}M "
        f"parameters ({model['config']}) at its top tier, bf16, {result['threads']} engine "
        f"threads, {result['input']} tokens in, {result['output']} out, greedy, all requests at "
        "once. `Engine.generate` and `Engine.stream` run alone; behind `dvpa serve` every token is "
        "a server-sent event to a client in another process of the same machine, whose CPU time "
        f"is counted, too. Medians of {result['rounds']} interleaved rounds; lost: share of the "
        "throughput, median of the rounds (lowest .. highest). The server's texts equal "
        f"`Engine.stream`'s in {result['same_texts']:.0%} of the requests."
    )
    head = [
        "at a time",
        "",
        "tok/s",
        "lost against generate",
        "lost against stream",
        "first token, ms",
        "CPU ms/token",
        "of it the client's",
    ]
    return text, head, [_overhead_row(row) for row in result["rows"]]


def _overhead_row(row: Row) -> list[str]:
    lost = row.get("throughput_lost", {})
    client = row.get("client_cpu_ms_per_token")
    return [
        str(row["concurrency"]),
        f"**{row['contender']}**" if lost else f"{row['contender']}",
        f"{row['tok_s']:.1f}" + (" (disturbed)" if row["is_disturbed"] else ""),
        _lost(lost.get("Engine.generate")),
        _lost(lost.get("Engine.stream")),
        f"{row['ttft_ms']:.0f}",
        f"{row['cpu_ms_per_token']:.2f}",
        "" if client is None else f"{client:.2f}",
    ]


def _lost(share: Row | None) -> str:
    if share is None:
        return ""
    return f"{share['median']:.1%} ({share['lowest']:.1%} .. {share['highest']:.1%})"


def overload_text(result: Row) -> str:
    """What `scripts/overload_server.py` found, in paragraphs."""
    load, stopped, killed = result["load"], result["sigterm"], result["kill"]
    health = load["health_ms"]
    ends = ", ".join(f"{count:,} {name}" for name, count in load["finish_reasons"].items())
    problems = "; ".join(result["problems"]) or "none"
    return "\n\n".join(
        [
            f"`python scripts/overload_server.py`: {load['clients']} clients for "
            f"{load['minutes']:g} minutes at {result['overload']:g} times the measured capacity "
            f"({load['capacity_requests_per_s']:.1f} requests/s of a small random model, one "
            f"thread, {result['max_num_seqs']} at a time, {result['max_queue']} may wait), a third "
            "of them leaving in the middle of every stream.",
            f"- **Load.** {load['sent']:,} requests ({load['offered_requests_per_s']:.0f}/s), "
            f"{load['let_in_requests_per_s']:.1f}/s let in: {load['answered']:,} answered "
            f"({ends}), {load['left_by_client']:,} left by their client, {_refusals(load)}; cut "
            f"off: {load['truncated']}, failed connections: {load['unconnected']}. Answered ones: "
            f"first byte {_spread(load['first_byte_ms'])}, all of it {_spread(load['total_ms'])}. "
            f"`/health`, asked {health['asked']:,} times from another process: {_spread(health)}. "
            "Memory from the first quarter on: "
            f"{load['growth_mib']:+.1f} MiB.",
            f"- **SIGTERM under load.** {stopped['answered']:,} requests answered in full, "
            f"{stopped['truncated']} cut off, {_refusals(stopped)}; ended after "
            f"{stopped['ended_after_s']:.1f} s ({stopped['drain_s']:g} s allowed) with exit code "
            f"{stopped['exit_code']}.",
            f"- **kill -9 under load.** Ready again {killed['ready_after_s']:.1f} s after the next "
            f"start, {'the same' if killed['same_answer'] else 'another'} answer to the same "
            "question.",
            f"Problems: {problems}.",
        ]
    )


def _refusals(row: Row) -> str:
    words = {"429": "refused by the bounded queue (429)", "503": "refused on shutdown (503)"}
    found = [f"{count:,} {words[status]}" for status, count in row["refused"].items()]
    return ", ".join(found) or "none refused"


def _spread(times: Row) -> str:
    if "p50" not in times:
        return "unknown"
    return f"p50 {times['p50']:.0f} ms, p99 {times['p99']:.0f} ms, max {times['max']:.0f} ms"


def locust_part(result: Row) -> Part:
    """(text, head, rows) of `scripts/bench_locust.py`."""
    text = (
        f"`python scripts/bench_locust.py CHECKPOINT`: {result['users']} of locust's users for "
        f"{result['minutes']:g} minutes at the demo's nano, one server, {result['threads']} engine "
        "thread, locust on the same machine. They stream, wait for whole answers, chat and ask for "
        "decisions (scripts/locustfile.py), 4 to 47 tokens an answer, and think for .05 to .5 s."
    )
    head = ["request", "number", "failed", "per s", "p50, ms", "p95, ms", "p99, ms"]
    rows = [
        [
            row["name"],
            f"{row['requests']:,}",
            str(row["failures"]),
            f"{row['per_s']:.1f}",
            *(f"{ms:.0f}" for ms in row["ms"].values()),
        ]
        for row in result["rows"]
    ]
    return text, head, rows
