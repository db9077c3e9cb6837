"""Render docs/benchmarks/*.json into docs/benchmarks.md.

python scripts/render_benchmarks.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablation_page
import assemble_page
import difficulty_page
import engine_page
import escalation_page
import plan_page
import pools_page
import server_page
import tier_map_page
import training_page
from kernel_page import FIGURE, fit_lines, introduction, kernel_parts, linear_png

Part = tuple[str, list[str], list[list[str]]]  # text, head, rows
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
HEADER = """# Benchmarks

Rendered by `scripts/render_benchmarks.py` from `docs/benchmarks/*.json`; every number was measured
by the command named beside it, contenders in the same run.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(environment: dict[str, str]) -> str:
    """One line about where it was measured."""
    return "Measured on: " + ", ".join(f"{key} {value}" for key, value in environment.items()) + "."


def _per_seed(report: dict[str, Any], router: str) -> str:
    """The paired differences of every seed."""
    differences = report["routers"][router]["adaptive_minus"].get("difference_per_seed", [])
    return ", ".join(f"{difference:+.3f}" for difference in differences)


def render_demo(report: dict[str, Any]) -> str:
    """The kept demo run: levels, routers, baselines."""
    seeds = ", ".join(map(str, report["seeds"]))
    adaptive = report["routers"]["adaptive"]
    levels = [
        [f"level {level}", *(f"{tier['quality_by_level'][i]:.3f}" for tier in report["tiers"])]
        for i, level in enumerate(report["levels"])
    ]
    levels.append(["**all**", *(f"**{tier['quality']:.3f}**" for tier in report["tiers"])])
    names = [f"{t['name']} ({t['activated_params'] / 1e3:,.0f}k)" for t in report["tiers"]]
    rows = []
    for name, row in report["routers"].items():
        low, high = row["ci95"]
        difference = row.get("adaptive_minus")
        requests = difference and difference.get("ci95_requests", difference["ci95"])
        rows.append(
            [
                f"**{name}**" if name == "adaptive" else name,
                f"{row['quality']:.3f}",
                f"{low:.3f} .. {high:.3f}",
                f"{row['mean_activated_params'] / 1e3:,.0f}k",
                f"{row.get('relative_cost', float('nan')):.0%}",
                f"{row['ms_per_request']:.2f}" if "ms_per_request" in row else "",
                f"{row['training_flops'] / 1e12:.1f}" if "training_flops" in row else "",
                ""
                if not difference
                else f"{difference['difference']:+.3f} ({requests[0]:+.3f} .. {requests[1]:+.3f})",
            ]
        )
    nested = sum(stage["training_flops"] for stage in report.get("stages", []))
    return "\n\n".join(
        [
            f"## The demo: nano, seeds {seeds}",
            f"`dvpa demo --seeds {len(report['seeds'])} --seed {report['seeds'][0]} --baselines`; "
            "means over seeds, held-out requests. Adaptive "
            f"keeps **{report['quality_kept']:.1%}** of the top tier's quality at "
            f"**{adaptive['relative_cost']:.0%}** of its mean activated parameters (head and "
            f"twice-read token included); APGR {report['apgr']:.2f} "
            f"(random mixing {report['random_apgr']:.2f}, prompt length "
            f"{report['length_apgr']:.2f}).",
            "All routers, the coin included, let the base tier read the prompt; the `always_*` "
            "rows read it with the answering tier. Activated parameters are means over tokens. "
            "Milliseconds: one request at a time, greedy, one thread. Always one tier over a "
            "base-read prompt: "
            + ", ".join(
                f"{row['name']} {row['quality']:.3f} at {row['mean_activated_params'] / 1e3:,.0f}k"
                for row in report["read_by_base"]
            )
            + ". Differences per seed, adaptive "
            "minus random: "
            + _per_seed(report, "random")
            + "; minus length: "
            + _per_seed(report, "length")
            + ".",
            table(["quality", *names], levels),
            "Routers. 95 % intervals are over seeds (t); the last column is the paired bootstrap "
            f"over requests. Nested training took {nested / 1e12:.1f} TFLOPs a seed; `fixed_*`: "
            "an ordinary MoE of the same size and FLOPs run at each tier's k, `specialist_*` "
            "one model per tier trained alone, all of them together for the same FLOPs.",
            table(
                [
                    "router",
                    "quality",
                    "95 %",
                    "activated",
                    "of top",
                    "ms/request",
                    "TFLOPs",
                    "adaptive minus",
                ],
                rows,
            ),
            machine(report["environment"]),
            (FOLDER / "selection.md").read_text().strip(),
        ]
    )


def render_tiers(result: dict[str, Any]) -> str:
    """Forward-pass time per tier beside Transformers."""
    parts = [
        "## One forward pass per tier, beside Transformers' DeepseekV3 on the exported tier",
        f"`python scripts/bench_tiers.py`: fp32, {result['threads']} thread(s), median of "
        f"{result['rounds']} interleaved rounds; ratio: Transformers' CPU time over ours.",
    ]
    rows = []
    for work in result["work"]:
        for contender, median in work["medians"].items():
            package, tier = contender.split(" ")
            if package != "dvpa":
                continue
            peer = work["medians"].get(f"transformers {tier}")
            rows.append(
                [
                    work["work"],
                    tier,
                    f"{median['cpu_ms']:.1f}",
                    f"{median['wall_ms']:.1f}",
                    f"{peer['cpu_ms']:.1f}" if peer else "",
                    f"{peer['cpu_ms'] / median['cpu_ms']:.2f}" if peer else "",
                ]
            )
    head = ["work", "tier", "dvpa CPU ms", "dvpa wall ms", "Transformers CPU ms", "ratio"]
    return "\n\n".join([*parts, table(head, rows), machine(result["environment"])])


def render_words(report: dict[str, Any]) -> str:
    """The real-text run."""
    rows = [
        [f"{row['kind']} ({row['num_requests']})", *(f"{nll:.4f}" for nll in row["nll_by_tier"])]
        for row in report["by_kind"]
    ]
    rows.append(["all", *(f"{tier['nll']:.4f}" for tier in report["tiers"])])
    difficulty = report["difficulty"]
    return "\n\n".join(
        [
            "## Real text and real problems: words",
            f"`dvpa train train/words.yaml`, seed {report['seed']}: held-out nll per token (nats) "
            "by tier. Difficulty against quality lost at the base tier: Spearman "
            f"{difficulty['spearman_by_tier'][0]:.3f}, partial given log prompt length "
            f"{difficulty['partial_spearman_by_tier'][0]:.3f} (length alone "
            f"{difficulty['length_spearman_by_tier'][0]:.3f}).",
            table(["examples", *(tier["name"] for tier in report["tiers"])], rows),
            machine(report["environment"]),
        ]
    )


def render_kernels(result: dict[str, Any]) -> str:
    """The expert kernels beside their peers and limits."""
    where = "a GPU" if result["machine"]["device"] == "cuda" else "a CPU"
    parts = [f"## The expert kernels on {where}", introduction(result)]
    for text, head, rows in kernel_parts(result):
        parts += [text, table(head, rows)]
    if lines := fit_lines(result):
        head = ["shape", "T", "implementation", "ms per k", "ms at k = 0", "R^2", "mixed off line"]
        parts += [
            f"![Time against mean k](benchmarks/{FIGURE})",
            "Time against mean k at fixed T: the line through "
            "uniform and mixed batches; last column: the mixed batch farthest from the line "
            "through the uniform ones.",
            table(head, lines),
        ]
    return "\n\n".join([*parts, machine({**result["machine"], **result["versions"]})])


def render_engine(result: dict[str, Any]) -> str:
    """The engine beside its peers, mixed traffic, limits, context."""
    (FOLDER / engine_page.FIGURE).write_bytes(engine_page.engine_png(result))
    parts = ["## The engine on a CPU"]
    for text, head, rows in engine_page.engine_parts(result):
        parts += [text, table(head, rows)]
    figure = f"![Decode step against batch size and context](benchmarks/{engine_page.FIGURE})"
    return "\n\n".join([*parts, figure, machine({**result["machine"], **result["versions"]})])


def render_soak(result: dict[str, Any]) -> str:
    """Half an hour of overload."""
    return "\n\n".join(["## The engine under overload", engine_page.soak_text(result)])


def render_speculation(result: dict[str, Any]) -> str:
    """Self-speculation against plain decoding."""
    head, rows = engine_page.speculation_rows(result)
    parts = [
        "## Tier self-speculation",
        (FOLDER / "speculation.md").read_text().strip(),
        f"`python scripts/bench_speculation.py CKPT --text ...`, {result['tokens']} tokens a "
        f"request, one thread, median of {result['rounds']} interleaved rounds:",
        table(head, rows),
    ]
    return "\n\n".join([*parts, machine({**result["machine"], **result["versions"]})])


def render_escalation(result: dict[str, Any]) -> str:
    """Going up while decoding, on nano."""
    parts = [(FOLDER / "escalation.md").read_text().strip()]
    for text, head, rows in escalation_page.escalation_parts(result):
        parts += [text, table(head, rows)]
    return "\n\n".join([*parts, machine(result["environment"])])


def render_server(result: dict[str, Any]) -> str:
    """What HTTP costs."""
    text, head, rows = server_page.overhead_part(result)
    where = machine({**result["machine"], **result["versions"]})
    return "\n\n".join(["## What the server costs", text, table(head, rows), where])


def render_overload(result: dict[str, Any]) -> str:
    """Overload, SIGTERM, kill -9."""
    where = machine({**result["machine"], **result["versions"]})
    return "\n\n".join(["## The server under overload", server_page.overload_text(result), where])


def render_locust(result: dict[str, Any]) -> str:
    """Locust's users."""
    text, head, rows = server_page.locust_part(result)
    where = machine({**result["machine"], **result["versions"]})
    return "\n\n".join(["## Locust at the server", text, table(head, rows), where])


def sections(title: str, parts: Sequence[Part], result: dict[str, Any], figure: str = "") -> str:
    """A heading, texts with their tables, and where it was measured."""
    lines = [f"## {title}"]
    for text, head, rows in parts:
        lines += [text, table(head, rows)]
    return "\n\n".join([*lines, *([figure] if figure else []), machine(result["environment"])])


def render_plan(result: dict[str, Any]) -> str:
    """Predicted and measured training steps."""
    return sections("Planned and measured training steps", [plan_page.plan_part(result)], result)


def render_difficulty(result: dict[str, Any]) -> str:
    """Correlations on real problems, and what a fifth of difficulty is worth."""
    (FOLDER / difficulty_page.FIGURE).write_bytes(difficulty_page.difficulty_png(result))
    figure = f"![The gap by difficulty](benchmarks/{difficulty_page.FIGURE})"
    parts = difficulty_page.difficulty_parts(result)
    return sections("Difficulty on real problems", parts, result, figure)


def render_tier_map(result: dict[str, Any]) -> str:
    """Solver, guard, hopeless requests."""
    (FOLDER / tier_map_page.FIGURE).write_bytes(tier_map_page.tier_map_png(result))
    figure = f"![What a hopeless request costs](benchmarks/{tier_map_page.FIGURE})"
    return sections("Fitting tier maps", tier_map_page.tier_map_parts(result), result, figure)


def render_ablation(result: dict[str, Any]) -> str:
    """Recipes and tier maps over seeds."""
    name = result["study"]["name"]
    title = ABLATIONS.get(name, f"recipes and tier maps on {name}")
    return sections(f"Ablation: {title}", ablation_page.ablation_parts(result), result)


def render_architectures(result: dict[str, Any]) -> str:
    """Architectures at equal tokens."""
    title = "Ablation: architectures at equal tokens"
    return sections(title, [ablation_page.architecture_part(result)], result)


def render_training(result: dict[str, Any]) -> str:
    """Training steps beside Transformers' Trainer."""
    title = "Training steps, beside Transformers' Trainer"
    return sections(title, [training_page.training_part(result)], result)


def render_assemble(result: dict[str, Any]) -> str:
    """Assembling beside mergekit and the disk."""
    title = "Assembling, beside mergekit and the disk"
    return sections(title, assemble_page.assemble_parts(result), result)


def render_pools(result: dict[str, Any]) -> str:
    """Which experts a converted checkpoint's lower tiers should have."""
    return sections("Pools of a converted DeepSeek-V3", [pools_page.pools_part(result)], result)


ABLATIONS = {
    "gates": "how the gate is normalised",
    "escalation": "escalation while decoding",
}
RENDERERS = {
    "demo": render_demo,
    "words": render_words,
    "ablation_nano": render_ablation,
    "ablation_escalation": render_ablation,
    "ablation_gates": render_ablation,
    "ablation_architecture": render_architectures,
    "difficulty": render_difficulty,
    "tier_map": render_tier_map,
    "tiers": render_tiers,
    "engine": render_engine,
    "engine_soak": render_soak,
    "server": render_server,
    "server_overload": render_overload,
    "server_locust": render_locust,
    "escalation": render_escalation,
    "speculation": render_speculation,
    "plan": render_plan,
    "training": render_training,
    "training_gpu": render_training,
    "assemble": render_assemble,
    "pools": render_pools,
    "kernels_cpu": render_kernels,
    "kernels_gpu": render_kernels,
}


def main() -> None:
    """Write docs/benchmarks.md and the kernels' figure."""
    parts = [HEADER.strip()]
    kernels = []
    for name, render in RENDERERS.items():
        path = FOLDER / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            parts.append(render(result))
            if name.startswith("kernels_"):
                kernels.append(result)
    if (png := linear_png(kernels)) is not None:
        (FOLDER / FIGURE).write_bytes(png)
    (FOLDER.parent / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
