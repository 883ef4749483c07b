"""The doctor's report as one page: no network, no script, nothing beside the file.

Everything that comes from a file is escaped. The plots are drawings inside of the page: a
box for the distribution of a statistic over the channels of a layer (5 to 95 %, with its
quartiles, median and extremes), and over the checkpoints of a run the median between
5 and 95 %.
"""

from __future__ import annotations

import html
import math
from typing import Sequence

from bn_tf1.doctor.examination import Examination, LayerRow, Spread
from bn_tf1.doctor.reports.terminal import number, printable, verdict

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;
color:#1c2430;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;overflow-wrap:anywhere;margin-top:2em}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25em .6em;border-bottom:1px solid #dde2e8;
vertical-align:middle}th{color:#5a6675;font-weight:600}
td:first-child{overflow-wrap:anywhere}
.verdict{font-weight:600;padding:.6em .9em;border-radius:.3em;background:#e4f4e8}
.verdict.sick{background:#fdeaea}
.finding{border-left:4px solid #8b98a8;padding:.2em 0 .2em .9em;margin:1em 0;
overflow-wrap:anywhere}
.finding.error{border-color:#c62828}.finding.warning{border-color:#e08e00}
.finding b{margin-right:.5em}.finding p{margin:.2em 0}
.tag{color:#5a6675;font-size:.9em}code{overflow-wrap:anywhere}
svg{display:block}.wrap{overflow-x:auto}
"""
_PLOT_WIDTH, _PLOT_HEIGHT = 150, 26
_MARGIN = 3
_COLUMNS = ("layer", "kind", "C", "decay", "epsilon", "mode")


def html_report(
    examinations: Sequence[Examination], unreadable: Sequence[tuple[str, str]] = ()
) -> str:
    """The page; `unreadable` are (path, error) of paths that could not be read."""
    is_sick = bool(unreadable) or not all(e.is_healthy for e in examinations)
    classes = "verdict sick" if is_sick else "verdict"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Batch norm: report</title><style>{_STYLE}</style></head><body>",
        "<h1>Batch norm: report</h1>",
        f'<p class="{classes}">{_escaped(verdict(examinations))}</p>',
    ]
    for path, error in unreadable:
        parts.append(f"<h2>{_escaped(path)}</h2><p>{_escaped(error)}</p>")
    for examination in examinations:
        parts += _examination(examination)
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _escaped(text):
    return html.escape(printable(text))


def _examination(examination):
    step = "" if examination.step is None else f", step {examination.step}"
    yield f"<h2>{_escaped(examination.path)}</h2>"
    yield f"<p>{_escaped(examination.kind + step)}</p>"
    for finding in examination.findings:
        yield _finding(finding)
    if examination.layers:
        yield from _table(examination)
    else:
        yield "<p>No batch-norm layer.</p>"


def _finding(finding):
    layer = f"<code>{_escaped(finding.layer)}</code> " if finding.layer else ""
    return (
        f'<div class="finding {_escaped(finding.gravity)}">'
        f"<p><b>{_escaped(finding.gravity)}</b>{layer}"
        f'<span class="tag">{_escaped(finding.check)}, {_escaped(finding.certainty)}'
        "</span></p>"
        f"<p>{_escaped(finding.what)}</p><p>{_escaped(finding.why)}</p>"
        f"<p><b>Remedy</b>{_escaped(finding.remedy)}</p>"
        f'<p class="tag">{_escaped(finding.where)}</p></div>'
    )


def _table(examination):
    rows = examination.layers
    has_plots = any(row.mean for row in rows)
    has_history = any(len(row.history) > 1 for row in rows)
    titles = list(_COLUMNS)
    titles += ["moving mean", "deviation"] if has_plots else []
    titles += ["mean over checkpoints", "deviation over checkpoints"] * has_history
    yield '<div class="wrap"><table><tr>'
    yield "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(_cells(row, has_plots, has_history)) + "</tr>"
    yield "</table></div>"


def _cells(row: LayerRow, has_plots, has_history):
    channels = "" if row.channels is None else str(row.channels)
    mode = "" if row.mode == "unknown" else row.mode
    texts = [row.name or "(no scope)", row.kind, channels]
    texts += [number(row.decay), number(row.epsilon), mode]
    for text in texts:
        yield f"<td>{_escaped(text)}</td>"
    if has_plots:
        yield f"<td>{_box(row.mean)}</td><td>{_box(row.deviation)}</td>"
    if has_history:
        for spreads in zip(*row.history) if row.history else ((), ()):
            yield f"<td>{_course(spreads)}</td>"


def _svg(drawing, title):
    return (
        f'<svg width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" role="img">'
        f"<title>{_escaped(title)}</title>{drawing}</svg>"
    )


def _is_drawable(spread):
    return spread is not None and all(math.isfinite(q) for q in spread.quantiles)


def _scale(low, high, length):
    """From a number in [low, high] to a place in a drawing of `length`."""
    # Halves, since the difference of two finite numbers need not be finite.
    span = high / 2 - low / 2
    room = length - 2 * _MARGIN

    def place(value):
        share = (value / 2 - low / 2) / span if span else 0.5
        return round(_MARGIN + room * share, 1)

    return place


def _box(spread: Spread | None) -> str:
    if not _is_drawable(spread):
        return ""
    low, five, first, median, third, ninety_five, high = spread.quantiles
    x = _scale(min(low, 0), max(high, 0), _PLOT_WIDTH)
    middle = _PLOT_HEIGHT / 2
    drawing = (
        f'<line x1="{x(0)}" x2="{x(0)}" y1="1" y2="{_PLOT_HEIGHT - 1}" '
        'stroke="#b8c1cc" stroke-dasharray="2 2"/>'
        f'<line x1="{x(five)}" x2="{x(ninety_five)}" y1="{middle}" y2="{middle}" '
        'stroke="#33658a"/>'
        f'<rect x="{x(first)}" y="{middle - 6}" height="12" '
        f'width="{max(x(third) - x(first), 1):.1f}" fill="#a9cbe3" stroke="#33658a"/>'
        f'<line x1="{x(median)}" x2="{x(median)}" y1="{middle - 6}" '
        f'y2="{middle + 6}" stroke="#12344d" stroke-width="2"/>'
        f'<circle cx="{x(low)}" cy="{middle}" r="1.5" fill="#33658a"/>'
        f'<circle cx="{x(high)}" cy="{middle}" r="1.5" fill="#33658a"/>'
    )
    return _svg(drawing, f"{low:.4g} to {high:.4g}, median {median:.4g}")


def _course(spreads: Sequence[Spread]) -> str:
    """The median over the checkpoints, between 5 and 95 %."""
    spreads = [spread for spread in spreads if _is_drawable(spread)]
    if len(spreads) < 2:
        return ""
    x = _scale(0, len(spreads) - 1, _PLOT_WIDTH)
    low = min(spread.quantiles[1] for spread in spreads)
    high = max(spread.quantiles[5] for spread in spreads)
    up = _scale(low, high, _PLOT_HEIGHT)

    def points(index):
        return [
            f"{x(i)},{_PLOT_HEIGHT - up(spread.quantiles[index]):.1f}"
            for i, spread in enumerate(spreads)
        ]

    band = " ".join(points(1) + points(5)[::-1])
    drawing = (
        f'<polygon points="{band}" fill="#cfe3f1"/>'
        f'<polyline points="{" ".join(points(3))}" fill="none" stroke="#12344d"/>'
    )
    steps = ", ".join(str(spread.step) for spread in spreads)
    return _svg(drawing, f"steps {steps}: {low:.4g} to {high:.4g}")
