"""`dvpa calibrate`: outcomes, or a server's log -> tier_map.json and a report."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpa.cli_checkpoint import open_engine, quiet_transformers, reading, require_checkpoint
from dvpa.cli_output import console, params_of, progress_bar, write_json

if TYPE_CHECKING:
    from dvpa.evaluate.calibration import CalibrationOptions
    from dvpa.pricing import ModelPrice
    from dvpa.tiers.tier_map import TierMap

EXAMPLE = "runs/demo/checkpoint --tasks graded:train/nano.yaml --read-prompt base --budget 39%"
FOLDER = "calibration"  # below the checkpoint, by default
# Options that say nothing without their source.
_ONLY_WITH = {
    "tasks": ("max_new_tokens", "concurrency", "no_nll"),
    "on_logs": ("last", "by_nll"),
}


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa calibrate`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    source = parser.add_argument_group("from what (one of these)")
    source.add_argument(
        "--tasks",
        nargs="+",
        metavar="SPEC",
        help="run every tier on FILE.jsonl, gsm8k:FILE, svamp:FILE, chat:FILE, text:FILE, graded, "
        "graded:RECIPE.yaml; nll:SPEC scores by nll; none of them trained on",
    )
    source.add_argument(
        "--outcomes", metavar="FILE", type=Path, help="an outcomes table, .jsonl or .parquet"
    )
    source.add_argument(
        "--on-logs", nargs="+", metavar="LOG", type=Path, help="what dvpa serve wrote to stderr"
    )
    for_what = parser.add_argument_group("for what (one of these)")
    for_what.add_argument(
        "--budget",
        metavar="B",
        help="a mean per request: 60%% (of the top tier's activated parameters), 1.5B, 300k "
        "(activated parameters), '2.5 GFLOPs', 25ms",
    )
    for_what.add_argument(
        "--min-quality", type=float, metavar="Q", help="the cheapest that keeps Q of the top tier's"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--kind", choices=["gain", "threshold"], help="default: gain")
    how.add_argument(
        "--upper-cut", action="store_true", help="threshold: hopeless requests stay at base"
    )
    how.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="at most A of the requests kept below the top tier may lose against it",
    )
    how.add_argument(
        "--delta", type=float, default=0.1, metavar="D", help="that may fail with D (default: 0.1)"
    )
    how.add_argument("--items", type=int, default=2000, help="tasks of each SPEC (default: 2000)")
    how.add_argument("--seed", type=int, default=0, help="of the choice and the splits")
    how.add_argument(
        "--read-prompt",
        choices=["tier", "base"],
        default="tier",
        help="who reads a routed prompt, as the engine's setting (default: tier)",
    )
    how.add_argument("--max-new-tokens", type=int, help="default: twice the longest reference")
    how.add_argument("--concurrency", type=int, help="requests at a time (default: 16)")
    how.add_argument("--no-nll", action="store_true", help="do not score the references")
    how.add_argument("--last", type=int, metavar="N", help="only the newest N logged requests")
    how.add_argument(
        "--by-nll", action="store_true", help="shadow outcomes by nll instead of agreement"
    )
    how.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 (as stored)")
    how.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    where = parser.add_argument_group("where to")
    where.add_argument("--out", metavar="DIR", type=Path, help=f"default: CKPT/{FOLDER}")
    where.add_argument(
        "--tier-map", metavar="FILE", type=Path, help="default: CKPT/tier_map.json, replaced"
    )


def calibrate(arguments: argparse.Namespace) -> None:
    """Fit a tier map, write it and the report, show what it does."""
    options = _options(arguments)
    require_checkpoint(arguments.checkpoint)
    from dvpa.checkpoint.export import read_config
    from dvpa.pricing import price

    with quiet_transformers(), reading(arguments.checkpoint):
        config = read_config(arguments.checkpoint)
    priced = price(config)
    _check_affordable(options, priced)
    if arguments.on_logs is not None:
        _from_logs(arguments, options, priced)
        return
    if config.difficulty is None:
        raise ValueError(f"{arguments.checkpoint}: has no difficulty head to calibrate")
    folder = arguments.out or arguments.checkpoint / FOLDER
    _from_outcomes(arguments, options, priced, folder)


def _options(arguments: argparse.Namespace) -> "CalibrationOptions":
    sources = ("tasks", "outcomes", "on_logs")
    given = [name for name in sources if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError("give one of --tasks, --outcomes, --on-logs")
    for source, names in _ONLY_WITH.items():
        for name in names:
            if getattr(arguments, name) not in (None, False) and source != given[0]:
                raise ValueError(f"--{name.replace('_', '-')}: needs --{source.replace('_', '-')}")
    if (arguments.budget is None) == (arguments.min_quality is None):
        raise ValueError("give one of --budget, --min-quality")
    for name in ("max_new_tokens", "concurrency", "threads", "last", "items"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} must be 1 or more")
    for name in ("alpha", "delta"):
        value = getattr(arguments, name)
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"--{name}: {value} must be between 0 and 1")
    if arguments.upper_cut and arguments.kind != "threshold":
        raise ValueError("--upper-cut: needs --kind threshold")
    from dvpa.evaluate.calibration import CalibrationOptions
    from dvpa.tiers.budget import Budget

    if arguments.budget is not None:
        budget = Budget.parse(arguments.budget)
    else:
        budget = Budget(min_quality=arguments.min_quality)
    return CalibrationOptions(
        budget,
        arguments.kind,
        arguments.alpha,
        arguments.delta,
        arguments.upper_cut,
        arguments.seed,
    )


def _check_affordable(options: "CalibrationOptions", priced: "ModelPrice") -> None:
    """A budget below the base tier is told before anything runs."""
    from dvpa.evaluate.calibration import of_whole
    from dvpa.tiers.budget import ROUNDING

    activated = [float(tier.activated_params) for tier in priced.tiers]
    if options.budget.unit != "activated_params":
        return
    limit = of_whole(options.budget, activated[-1]).mean_limit(activated)
    if limit is not None and limit < activated[0] * (1 - ROUNDING):
        raise ValueError(
            f"--budget: a mean of {limit:g} activated parameters cannot be kept; the base tier, "
            f"{priced.tiers[0].name}, costs {activated[0]:g} ({activated[0] / activated[-1]:.1%} "
            "of the top tier)"
        )


def _from_outcomes(
    arguments: argparse.Namespace,
    options: "CalibrationOptions",
    priced: "ModelPrice",
    folder: Path,
) -> None:
    from dvpa.evaluate.calibration import calibrate_table
    from dvpa.evaluate.report import finite, write_report
    from dvpa.evaluate.table import OutcomeTable

    questions, notes = None, []
    if arguments.outcomes is not None:
        try:
            table = OutcomeTable.load(arguments.outcomes)
        except ImportError as error:
            raise ValueError(str(error)) from None
        notes.append(f"outcomes  {arguments.outcomes} ({len(table):,} requests)")
    else:
        table, questions, notes = _collect(arguments, priced, folder)
    tier_map, report = calibrate_table(
        table,
        priced,
        options,
        title=f"Calibration of {arguments.checkpoint.resolve().name}",
        questions=questions,
    )
    written = _save(arguments, tier_map)
    files = write_report(report, folder)
    plain = finite(report)
    content = {**plain, "tier_map": json.loads(tier_map.to_json())}
    if not write_json(arguments.json, content):
        _show(plain, tier_map, options)
        for note in (*notes, f"tier map  {written}", f"report    {files['report.html']}"):
            console().print(note, markup=False)  # [parquet] is no style


def _collect(
    arguments: argparse.Namespace, priced: "ModelPrice", folder: Path
) -> tuple[Any, dict[str, str], list[str]]:
    """Outcomes of --tasks, the questions by id, and what to say about them."""
    from dvpa.tasks.specs import read_tasks

    tasks, num_repeats = read_tasks(arguments.tasks, arguments.items, arguments.seed)
    engine = open_engine(
        arguments,
        arguments.concurrency or 16,
        prefix_caching=False,
        read_prompt=arguments.read_prompt,
    )
    from dvpa.evaluate.engine_outcomes import checkpoint_id, run_outcomes
    from dvpa.evaluate.parquet import has_pyarrow, save_parquet

    with reading(arguments.checkpoint):
        model_id = checkpoint_id(arguments.checkpoint)
    try:
        with progress_bar("outcomes") as progress:
            run = run_outcomes(
                engine,
                tasks,
                folder / "outcomes.jsonl",
                model_id=model_id,
                max_tokens=arguments.max_new_tokens,
                with_nll=not arguments.no_nll,
                progress=progress,
            )
    finally:
        engine.close()
    left_out = [f"{run.num_too_long} too long for the context"] * bool(run.num_too_long)
    left_out += [f"{num_repeats} repeated"] * bool(num_repeats)
    said = f"{len(run.table):,} requests" + "".join(f", {part}: left out" for part in left_out)
    parquet = "; for Parquet: pip install 'dvpa[parquet]'"
    if has_pyarrow():
        path = folder / "outcomes.parquet"
        save_parquet(run.table, path, [tier.name for tier in priced.tiers])
        parquet = f", {path.name}"
    questions = {task.id: task.question for task in tasks}
    return run.table, questions, [f"outcomes  {run.path}{parquet} ({said})"]


def _from_logs(
    arguments: argparse.Namespace, options: "CalibrationOptions", priced: "ModelPrice"
) -> None:
    from dvpa.evaluate.recalibration import recalibrate
    from dvpa.evaluate.server_logs import read_server_logs
    from dvpa.tiers.tier_map import TierMap

    before = TierMap.load(arguments.checkpoint / "tier_map.json")
    log = read_server_logs(arguments.on_logs, len(priced.tiers), arguments.last)
    tier_map, found = recalibrate(
        log, before, priced, options, arguments.by_nll, arguments.read_prompt
    )
    written = _save(arguments, tier_map)
    if write_json(arguments.json, {**found, "tier_map": json.loads(tier_map.to_json())}):
        return
    out, drift, budget = console(), found["drift"], found["budget"]
    out.print(
        f"traffic   {found['requests']:,} routed requests, {found['shadow_outcomes']:,} shadow "
        f"outcomes; {found['unscored']:,} not routed, {found['other_lines']:,} other lines"
    )
    shown = "unknown: too few requests, or no histogram in the old map"
    if drift is not None:
        state = "as calibrated" if drift < 0.1 else "drifting" if drift < 0.25 else "another mix"
        shown = f"{drift:.3f} against the old map's calibration ({state})"
    out.print(f"drift     {shown}")
    before_text, after = (_amount(budget[key], budget["unit"]) for key in ("before", "after"))
    out.print(
        f"budget    {_stated(options)}{_limit(budget)}: {before_text} before, {after} with the "
        "new map"
    )
    out.print(f"curves    {found['curves']}")
    if found["guard_dropped"]:
        out.print("guard     dropped: it was one for the old decisions (--alpha fits another)")
    out.print(f"tier map  {written}")


def _save(arguments: argparse.Namespace, tier_map: "TierMap") -> Path:
    path: Path = arguments.tier_map or arguments.checkpoint / "tier_map.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tier_map.save(path)
    return path


def _show(report: Mapping[str, Any], tier_map: "TierMap", options: "CalibrationOptions") -> None:
    """The result in lines."""
    out, section, adaptive = console(), report["calibration"], report["routers"]["adaptive"]
    budget, stay_low = section["budget"], section["stay_low"]
    unit, top = budget["unit"], report["tiers"][-1]
    spent = f"{_amount(budget['test'], unit)} on test requests"
    if budget.get("deviation") is not None:
        spent += f" ({budget['deviation']:+.1%})"
    out.print(f"budget    {_stated(options)}{_limit(budget)}: {spent}")
    others = [
        f"{name} {report['routers'][name]['quality']:.3f}"
        for name in ("random", "length", "tfidf")
        if name in report["routers"]
    ]
    kept = report["quality_kept"]
    out.print(
        f"quality   {adaptive['quality']:.3f}"
        + ("" if kept is None else f", {kept:.1%} of {top['name']}'s {top['quality']:.3f}")
        + f"; at the same cost {', '.join(others)}"
    )
    shares = zip(report["tiers"], adaptive["tier_share"], strict=True)
    out.print("tiers     " + ", ".join(f"{tier['name']} {share:.0%}" for tier, share in shares))
    test, guard = stay_low["test"], stay_low["guard"]
    promised = "no guard (--alpha)"
    if guard is not None:
        promised = (
            f"bound {guard['bound']:.1%} (alpha {guard['alpha']:g}, delta {guard['delta']:g})"
        )
    out.print(
        f"stay low  {test['kept']:,} test requests below {top['name']}, {test['rate']:.1%} of them "
        f"lose against it; {promised}"
    )
    difficulty, head = report["difficulty"], section["head"]
    out.print(
        f"head      AUROC of failing at base {_number(difficulty['auroc_by_tier'][0])} (length "
        f"{_number(difficulty['length_auroc_by_tier'][0])}), partial Spearman given length "
        f"{_number(difficulty['partial_spearman_by_tier'][0])}; calibration error "
        f"{_number(head['ece_base_raw'])} -> {_number(head['ece_base'])}"
    )
    if section["without_difficulty"]:
        out.print(f"left out  {section['without_difficulty']:,} requests without a difficulty")


def _stated(options: "CalibrationOptions") -> str:
    ((name, value),) = options.budget.to_dict().items()
    if name == "min_quality":
        return f"quality at least {value:.1%} of the top tier's"
    return f"{value:.0%}" if name == "fraction" else _amount(value, options.budget.unit)


def _limit(budget: Mapping[str, Any]) -> str:
    if "fraction" not in budget["stated"] or budget.get("limit") is None:
        return ""
    return f" = {_amount(budget['limit'], budget['unit'])}"


def _amount(value: float, unit: str) -> str:
    if unit == "ms":
        return f"{value:.4g} ms"
    return f"{params_of(value)} activated" if unit != "flops" else f"{value:.4g} FLOPs"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
