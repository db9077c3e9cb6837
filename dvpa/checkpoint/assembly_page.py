"""assembly.html, one self-contained page, and the model card: the report for people."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from dvpa.checkpoint.assembly_figure import histogram_svg
from dvpa.checkpoint.step_table import ACTIONS

FIGURE = "assembly.svg"
_STYLE = """
:root{--bg:#ffffff;--fg:#1c1e21;--muted:#62676e;--line:#e4e6e9}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--fg:#e8eaed;--muted:#9aa0a8;--line:#2f3338}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:64rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .75rem}
h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
.note,.quiet{color:var(--muted)}
.note{font-size:.875rem;margin:.5rem 0 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(6.5rem,1fr));gap:1rem;
margin:1rem 0 0;border-block:1px solid var(--line);padding:1rem 0}
dt{color:var(--muted);font-size:.8125rem}
dd{margin:0;font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;min-width:34rem;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-left:.4rem}
thead th{color:var(--muted);font-weight:500;font-size:.8125rem;vertical-align:bottom;
white-space:normal}
tbody th{font-weight:500}
tr.total th,tr.total td{font-weight:600}
td.text,th.text{text-align:left}
td.text{white-space:normal;min-width:12rem;overflow-wrap:anywhere}
"""
_LICENCE_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page for a report of plain JSON values."""
    title = f"Assembly: {report['recipe']['name']}"
    sections = [
        _header(report, title),
        _differences(report),
        f"<section><h2>By class</h2>{_coverage_table(report['classes'], report)}{_meaning()}"
        "</section>",
        _rules(report),
        _parents(report),
        _warnings(report),
        _environment(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def render_card(report: Mapping[str, Any], base: Path) -> str:
    """README.md of the result: its parents and what was merged; keeps the base's licence."""
    recipe = report["recipe"]
    shares = {i: rule["lambda"] for i, rule in enumerate(recipe["rules"])}
    head = {
        **_front_matter(base / "README.md"),
        "base_model": [Path(folder).name for folder in recipe["parents"].values()],
        "library_name": "transformers",
        "tags": ["merge", "assembly-of-experts", "dvpa"],
    }
    rules = "\n".join(
        f"| {i} | {_cell(rule['match'])} | "
        + ", ".join(f"{name} {share:g}" for name, share in shares[i].items() if share)
        + f" | {report['rules'][i]['tensors']:,} |"
        for i, rule in enumerate(recipe["rules"])
    )
    classes = "\n".join(
        f"| {row['name'].replace('_', ' ')} | {row['tensors']:,} | "
        + " | ".join(f"{row['actions'][action]:,}" for action in ACTIONS)
        + f" | {_number((row['difference'] or {}).get('median'))} |"
        for row in report["classes"]
    )
    parents = "\n".join(
        f"- **{_cell(name)}**: {_cell(Path(folder).name)}"
        + (" (base: names, layout, tokenizer and config)" if name == recipe["base"] else "")
        for name, folder in recipe["parents"].items()
    )
    figure = f"![Differences from the base by class]({FIGURE})\n\n" if histogram_svg(report) else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {_cell(recipe['name'])}\n\n"
        "Put together from the tensors of its parents by `dvpa assemble` (Assembly of Experts, "
        "arXiv 2506.14794); no training.\n\n"
        f"{parents}\n\n## Rules\n\nThe first that matches decides.\n\n"
        f"| | tensors | shares | matched |\n| --- | --- | --- | ---: |\n{rules}\n\n"
        "## Coverage\n\n"
        f"| class | tensors | {' | '.join(ACTIONS)} | median difference |\n"
        f"| --- | ---: |{' ---: |' * len(ACTIONS)} ---: |\n{classes}\n\n"
        + "".join(f"- {action}: {text}\n" for action, text in ACTIONS.items())
        + "\nDifferences are root mean squares over a tensor's elements. Details: "
        f"`assembly.html`, `assembly.json`, `assembly_tensors.csv`.\n\n{figure}"
    ).rstrip() + "\n"


def _header(report: Mapping[str, Any], title: str) -> str:
    actions = report["actions"]
    facts = [("tensors", f"{report['tensors']:,}"), ("data", _bytes(report["num_bytes"]))]
    facts += [(action, f"{actions[action]:,}") for action in ACTIONS]
    facts.append(("seconds", f"{report['wall_seconds']:,.1f}"))
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    parents = ", ".join(report["recipe"]["parents"])
    return (
        f"<header><h1>{escape(title)}</h1><p class=note>from {escape(parents)}; base: "
        f"{escape(report['recipe']['base'])}</p><dl class=facts>{cells}</dl></header>"
    )


def _differences(report: Mapping[str, Any]) -> str:
    svg = histogram_svg(report)
    if not svg:
        return "<section><h2>Differences</h2><p class=note>Nothing was compared.</p></section>"
    return (
        f"<section><h2>Differences</h2><div class=scroll>{svg}</div><p class=note>"
        "|| W - W_base || / sqrt(numel) per tensor, of the parent that differs most among those "
        "that share in it; each row has its own height. Equal tensors are left out.</p></section>"
    )


def _coverage_table(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    spreads = ("median difference", "95 %", "largest", "median, relative")
    head = ["class", "tensors", "data", *ACTIONS, *spreads]
    body = []
    for row in rows:
        spread = row["difference"] or {}
        cells = [f"<th scope=row>{escape(row['name'].replace('_', ' '))}</th>"]
        cells.append(f"<td>{row['tensors']:,}</td><td>{_bytes(row['num_bytes'])}</td>")
        cells += [f"<td>{_count(row['actions'][action])}</td>" for action in ACTIONS]
        cells += [f"<td>{_number(spread.get(key))}</td>" for key in ("median", "p95", "max")]
        cells.append(f"<td>{_percent(row['relative'])}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    total = [f"<td>{report['tensors']:,}</td><td>{_bytes(report['num_bytes'])}</td>"]
    total += [f"<td>{_count(report['actions'][action])}</td>" for action in ACTIONS]
    body.append(f"<tr class=total><th scope=row>all</th>{''.join(total)}{'<td></td>' * 4}</tr>")
    return _table(head, body)


def _meaning() -> str:
    text = "; ".join(f"{action}: {meaning}" for action, meaning in ACTIONS.items())
    return f"<p class=note>{escape(text)}. An FP8 weight and its scale are two tensors.</p>"


def _rules(report: Mapping[str, Any]) -> str:
    names = list(report["recipe"]["parents"])
    body = []
    for i, rule in enumerate(report["recipe"]["rules"]):
        row = report["rules"][i]
        cells = [f"<th scope=row>{i}</th><td class=text>{escape(rule['match'])}</td>"]
        cells += [f"<td>{rule['lambda'][name]:g}</td>" for name in names]
        cells.append(f"<td>{row['tensors']:,}</td>")
        cells += [f"<td>{_count(row['actions'][action])}</td>" for action in ACTIONS]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = ["rule", "matches", *names, "tensors", *ACTIONS]
    return f"<section><h2>By rule</h2>{_table(head, body, text=1)}</section>"


def _parents(report: Mapping[str, Any]) -> str:
    taken = {
        name: sum(row["parents"][name] for row in report["classes"])
        for name in report["recipe"]["parents"]
    }
    body = [
        f"<tr><th scope=row>{escape(name)}</th><td class=text>{escape(folder)}</td>"
        f"<td>{_count(taken[name])}</td></tr>"
        for name, folder in report["recipe"]["parents"].items()
    ]
    head = ["parent", "folder", "tensors taken byte for byte"]
    left_out = ", ".join(report.get("left_out") or ["none"])
    return (
        f"<section><h2>Parents</h2>{_table(head, body, text=1)}<p class=note>"
        f"Files of the base that were not copied: {escape(left_out)}.</p></section>"
    )


def _warnings(report: Mapping[str, Any]) -> str:
    if not report["warnings"]:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in report["warnings"])
    return f"<section><h2>Worth a look</h2><ul>{items}</ul></section>"


def _environment(report: Mapping[str, Any]) -> str:
    items = [f"{name} {version}" for name, version in report["environment"].items()]
    items.append(f"read {_bytes(report['bytes_read'])}")
    if report["resumed_shards"]:
        items.append(f"{report['resumed_shards']} shards finished by an earlier run")
    return f"<p class=note>{escape(', '.join(items))}</p>"


def _table(head: Sequence[str], body: Sequence[str], text: int | None = None) -> str:
    """`text`: the column of words, which start on the left."""
    cells = "".join(
        f"<th scope=col{' class=text' if i == text else ''}>{escape(name)}</th>"
        for i, name in enumerate(head)
    )
    return (
        f"<div class=scroll><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """What the base's model card says of its licence; empty where it says nothing readable."""
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0]:
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    known = data if isinstance(data, dict) else {}
    return {key: known[key] for key in _LICENCE_KEYS if key in known}


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _count(number: int) -> str:
    return f"{number:,}" if number else "&ndash;"


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "&ndash;" if value is None else f"{100 * value:.2g}&nbsp;%"


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
