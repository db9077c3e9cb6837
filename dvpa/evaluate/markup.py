"""Pieces of the self-contained HTML reports: the document, tables, numbers; light and dark."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dvpa.evaluate.figure import DARK, LIGHT, Theme


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def picture(light_png: bytes, dark_png: bytes, alt: str) -> str:
    """An image that follows the reader's appearance; `alt` in plain text."""
    light, dark = (base64.b64encode(png).decode() for png in (light_png, dark_png))
    return (
        "<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img src="data:image/png;base64,{light}" alt="{escape(alt)}"></picture>'
    )


def table(head: Sequence[str], body: Sequence[str]) -> str:
    """Headings in plain text, rows as HTML."""
    cells = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    return (
        f"<div class=scroll><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def number(value: Any, digits: int = 3) -> str:
    """A dash where it is undefined."""
    return "&ndash;" if value is None else f"{value:.{digits}f}"


def interval(interval: Sequence[float | None] | None) -> str:
    """From, to."""
    if interval is None or None in interval:
        return "&ndash;"
    return f"{interval[0]:.3f}&nbsp;to&nbsp;{interval[1]:.3f}"


def signed(difference: Mapping[str, Any]) -> str:
    """`difference` and its `ci95`, coloured where the interval excludes 0."""
    if difference.get("difference") is None:
        return ""
    low, high = difference["ci95"]
    sure = "" if low <= 0 <= high else (" class=better" if low > 0 else " class=worse")
    return (
        f"<span{sure}>{difference['difference']:+.3f}</span> "
        f"<span class=quiet>{low:+.3f}&nbsp;to&nbsp;{high:+.3f}</span>"
    )


def heat(value: float | None) -> str:
    """A cell whose shade is the value, from 0 to 1."""
    if value is None:
        return "<td>&ndash;</td>"
    return f'<td class=heat style="--v:{100 * min(max(value, 0.0), 1.0):.0f}%">{value:.3f}</td>'


def shown(value: Any) -> str:
    """Any JSON value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def _variables(theme: Theme) -> str:
    return (
        f"--bg:{theme.background};--fg:{theme.text};--muted:{theme.muted};--line:{theme.grid};"
        f"--accent:{theme.adaptive};--good:{theme.oracle};--bad:{theme.length}"
    )


def style() -> str:
    """The style sheet of both appearances."""
    return (
        f":root{{{_variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        + _RULES
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .75rem}
h2{font-size:1.15rem;margin:2.75rem 0 .75rem}
.lead{font-size:1.15rem;margin:0 0 .25rem;max-width:40rem}
.note,figcaption,.quiet{color:var(--muted)}
.note,figcaption{font-size:.875rem;margin:.5rem 0 0}
.quiet{font-weight:400}
dl{margin:1rem 0 0}
dt{color:var(--muted);font-size:.8125rem}
dd{margin:0;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1rem;
border-block:1px solid var(--line);padding:1rem 0}
.facts dd{font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));
gap:.5rem 1.5rem;font-size:.875rem}
.fields{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
figure{margin:0}
img{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-left:.4rem}
thead th{color:var(--muted);font-weight:500;font-size:.8125rem;vertical-align:bottom}
tbody th{font-weight:500}
tr.adaptive th,tr.adaptive td{font-weight:600;
background:color-mix(in srgb,var(--accent) 12%,transparent)}
tr.total th,tr.total td{font-weight:600}
.dense table{font-size:.8125rem}
.dense th,.dense td{padding:.35rem .4rem}
.heat{background:color-mix(in srgb,var(--accent) calc(var(--v)*.3),transparent)}
.better{color:var(--good)}
.worse{color:var(--bad)}
details{border-bottom:1px solid var(--line);padding:.6rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
summary .quiet{margin-left:.5rem;font-size:.875rem}
code{font:.9375rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.tag{float:right;color:var(--accent);font-weight:600;font-size:.875rem;margin-left:.75rem}
"""
