"""The doctor's report as one page: no network, no script, nothing beside the file.

Everything that comes from a file is escaped. The statistics of all layers are drawn over
one scale each, so that layers can be compared; the scale is linear near 0 and logarithmic
beyond where the layers are far apart. A window may be as narrow as a telephone's.
"""

from __future__ import annotations

from typing import Sequence

from bn_tf1.doctor.examination import Examination
from bn_tf1.doctor.register import BY_NAME, by_place
from bn_tf1.doctor.reports import charts
from bn_tf1.doctor.reports.grouping import (
    common_scope,
    findings_by_check,
    layer_groups,
)
from bn_tf1.doctor.reports.terminal import (
    counts,
    number,
    places_by_text,
    plural,
    told_mode,
    verdict,
)

_MAX_TOLD = 6
_SETTINGS = ("kind", "decay", "epsilon", "mode")
# What each kind of path is examined for.
_PLACES = {
    "graph": ("graph",),
    "checkpoint": ("checkpoint",),
    "saved_model": ("graph", "checkpoint"),
    "training directory": ("training directory", "checkpoint", "graph"),
}
_STYLE = """
h2{margin:2.2rem 0 .2rem}h3{font-size:1rem;margin:1.6rem 0 .5rem}
h2,code,.finding,td{overflow-wrap:anywhere}small{font-size:.85em}
code{font:.92em ui-monospace,monospace}
.verdict{font-weight:600;margin:1em 0}
.finding{border:1px solid var(--rule);border-left:.4em solid var(--note);
border-radius:.4em;padding:.5em .9em;margin:.7em 0;background:var(--panel)}
.finding.error{border-left-color:var(--error)}
.finding.warning{border-left-color:var(--warning)}
.finding h4{margin:0;font-size:1rem}.finding ul{margin:.4em 0;padding-left:1.2em}
.tag{font-size:.78rem;font-weight:600;margin-right:.6em;text-transform:uppercase}
.error>.tag,i.error{color:var(--error)}.warning>.tag,i.warning{color:var(--warning)}
.note>.tag,i.note{color:var(--note)}i.error,i.warning,i.note{font-style:normal}
dl{display:grid;grid-template-columns:5em 1fr;margin:.3em 0;gap:.2em .8em}
dt{color:var(--soft)}dd{margin:0;min-width:0}
details{margin:.5em 0}
.layers{width:100%;border-collapse:collapse}.layers th{text-align:left;
color:var(--soft);font-weight:600;font-size:.85em;vertical-align:bottom}
.layers td,.layers th{padding:.12em .6em;border-bottom:1px solid var(--rule)}
.layers .plotted,.layers .p0,.layers .p1{padding-right:1.5em}
.layers td.name{font:.85em ui-monospace,monospace}.layers .plotted{width:32%}
.layers thead{position:sticky;top:0;background:var(--bg);z-index:1}
.p0 svg{background:var(--r0)}.p1 svg{background:var(--r1)}
.legend{display:grid;grid-template-columns:9em 1fr;gap:0 1em;max-width:60em;
font-size:.85em;color:var(--soft);align-items:center}
.courses{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1.2em}
.checks{font-size:.88em;width:100%;border-collapse:collapse}
.checks td{padding:.1em .6em .1em 0;vertical-align:top}
@media(max-width:44rem){.layers,.layers tbody,.layers thead{
display:block}.layers tr{display:grid;grid-template-columns:1fr 1fr;
border-bottom:1px solid var(--rule);padding:.25em 0}.layers td,.layers th{border:0;
padding:.05em 1.5em .05em 0}.layers .name{grid-column:1/-1}.layers .plotted{width:auto}
.layers .value{display:none}.checks td{display:block}}
"""


def html_report(
    examinations: Sequence[Examination], unreadable: Sequence[tuple[str, str]] = ()
) -> str:
    """The page; `unreadable` are (path, error) of paths that could not be read."""
    is_sick = bool(unreadable) or not all(e.is_healthy for e in examinations)
    parts = [
        f'<p class="verdict{" sick" * is_sick}">{charts.escaped(verdict(examinations))}</p>'
    ]
    for path, error in unreadable:
        parts.append(f"<h2>{charts.escaped(path)}</h2><p>{charts.escaped(error)}</p>")
    for examination in examinations:
        parts += _examination(examination)
    heading = "Batch norm: report"
    return charts.document(heading, heading, _STYLE, parts)


def _examination(examination):
    step = "" if examination.step is None else f", step {examination.step}"
    told = f"{examination.kind}{step}: {counts(examination.findings) or 'no findings'}"
    yield f"<section><h2>{charts.escaped(examination.path)}</h2>"
    yield f'<p class="soft">{charts.escaped(told)}</p>'
    for group in findings_by_check(examination.findings):
        yield _findings(group, examination.path)
    if examination.layers:
        yield from _layers(examination)
        yield from _courses(examination)
    else:
        yield "<p>No batch-norm layer.</p>"
    yield from _checks(examination)
    yield "</section>"


# ------------------------------------------------------------------------------ findings


def _findings(group, path):
    first = group[0]
    check = BY_NAME.get(first.check)
    times = f" in {plural(len(group), 'place')}" if len(group) > 1 else ""
    told = [_told(*item) for item in places_by_text(group, path).items()]
    rest = "".join(told[_MAX_TOLD:])
    more = _folded(len(told), rest and f"<ul>{rest}</ul>")
    return (
        f'<article class="finding {charts.escaped(first.gravity)}">'
        f'<span class="tag">{charts.escaped(first.gravity)}</span>'
        f"<b>{charts.escaped(first.check)}</b>"
        f'<span class="soft">{times}, {charts.escaped(first.certainty)}</span>'
        + (f"<p>{charts.escaped(check.what)}</p>" if check else "")
        + f"<ul>{''.join(told[:_MAX_TOLD])}</ul>{more}"
        f"<dl><dt>why</dt><dd>{charts.escaped(first.why)}</dd>"
        f"<dt>remedy</dt><dd>{charts.escaped(first.remedy)}</dd></dl></article>"
    )


def _told(what, places):
    """What is wrong, and the places: the first of them, and all if it is clicked."""
    codes = [f"<code>{charts.escaped(place)}</code>" for place in places]
    first, rest = "<br>".join(codes[:_MAX_TOLD]), "<br>".join(codes[_MAX_TOLD:])
    return f"<li>{charts.escaped(what)}<br>{first}{_folded(len(codes), rest)}</li>"


def _folded(count, rest):
    """What is left of `count`, to be opened with a click; "" where nothing is."""
    summary = f"<summary>{count - _MAX_TOLD} more</summary>"
    return f"<details>{summary}{rest}</details>" if rest else ""


# ------------------------------------------------------------------------------- layers


def _layers(examination):
    rows = examination.layers
    groups = layer_groups(rows, examination.findings, len(rows))
    scope = common_scope([row.name for row in rows])
    common, columns = _settings(rows)
    told = [plural(len(rows), "batch-norm layer"), f"in {scope}" * bool(scope), *common]
    yield f"<h3>Layers</h3><p>{charts.escaped(', '.join(filter(None, told)))}</p>"
    plotted = [row for row in rows if row.mean is not None]
    axes = [
        charts.axis_of(q for row in plotted for q in getattr(row, part).quantiles)
        for part in ("mean", "deviation")
    ]
    if plotted:
        yield _legend(axes)
    # The rules behind the boxes are one background for all rows.
    behind = ";".join(f"--r{i}:{charts.rules(axis)}" for i, axis in enumerate(axes))
    yield f'<table class="layers" style="{behind}"><thead><tr><th class="name">layer</th>'
    yield "".join(f'<th class="value">{title}</th>' for title in ("C", *columns))
    if plotted:
        for title, axis in zip(("moving mean", "moving deviation"), axes):
            yield f'<th class="plotted">{title}{charts.labels(axis, "x")}</th>'
    yield "</tr></thead><tbody>"
    for group in groups:
        cells = _cells(group, columns, axes if plotted else (), scope)
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table>"


def _settings(rows):
    """(what is said of all layers, the settings that have a column each)."""
    common, columns = [], []
    for title in _SETTINGS:
        values = {_setting(row, title) for row in rows}
        if len(values) > 1:
            columns.append(title)
        elif values != {""}:
            common.append(f"{title} {values.pop()}")
    return common, columns


def _setting(row, title):
    if title == "mode":
        return told_mode(row)
    return row.kind if title == "kind" else number(getattr(row, title))


def _cells(group, columns, axes, scope):
    """The cells of a row: the layer, marked for what was found, and what is known of it."""
    row = group.rows[0]
    mark = f'<i class="{group.gravity}" title="{group.gravity}">\N{BLACK CIRCLE}</i> '
    name = charts.escaped(row.name[len(scope) :] or "(no scope)")
    yield f'<td class="name">{mark * bool(group.gravity)}{name}</td>'
    values = ["" if row.channels is None else str(row.channels)]
    values += [charts.escaped(_setting(row, title)) for title in columns]
    yield from (f'<td class="value">{value}</td>' for value in values)
    for i, (spread, axis) in enumerate(zip((row.mean, row.deviation), axes)):
        if spread is None:
            yield "<td></td>"
            continue
        low, *_, median, _, _, high = spread.quantiles
        title = f"{low:.4g} to {high:.4g}, median {median:.4g}"
        yield f'<td class="p{i}">{charts.box(spread.quantiles, axis, title)}</td>'


def _legend(axes):
    sample = charts.box((2, 10, 30, 45, 60, 85, 98), charts.Axis(0, 100), "legend")
    bent = any(axis.unit is not None for axis in axes)
    return (
        f'<div class="legend"><div>{sample}</div><div>one box for each layer, over its '
        "channels: the line is 5 to 95 %, the box the quartiles, the bar the median, the "
        "short bars the extremes; all layers have one scale"
        + (", logarithmic away from 0" if bent else "")
        + "</div></div>"
    )


def _courses(examination):
    """The statistics over the checkpoints of a run, all layers over one scale."""
    rows = [row for row in examination.layers if len(row.history) > 1]
    if not rows:
        return
    scope = common_scope([row.name for row in rows])
    # Of many layers, these alone have a colour: more colours than that nobody tells
    # apart.
    sick = {f.layer for f in examination.findings if f.gravity != "note"}
    are_few = len(rows) <= charts.COLOURS
    told = "the median over the channels" + ", one line for each layer" * (not are_few)
    if sick and not are_few:
        told += '; <span class="s1">with an error or a warning</span>'
    yield f'<h3>Over the checkpoints</h3><p class="soft">{told}</p><div class="courses">'
    for part, title in ((0, "moving mean"), (1, "moving deviation")):
        series = [
            charts.Series(
                row.name[len(scope) :],
                [
                    (both[part].step or 0, both[part].quantiles[3])
                    for both in row.history
                ],
                colour=i if are_few else int(row.name in sick),
                is_faint=not are_few and row.name not in sick,
            )
            for i, row in enumerate(rows)
        ]
        # What is drawn later lies above: those that are sick.
        yield charts.lines(
            sorted(series, key=lambda one: not one.is_faint),
            title=title,
            x_name="step",
            has_legend=are_few,
        )
    yield "</div>"


# ------------------------------------------------------------------------------- checks


def _checks(examination):
    """One line on each check: what it finds, and whether it did."""
    found = {finding.check for finding in examination.findings}
    reasons = {
        check: unchecked.reason
        for unchecked in examination.unchecked
        for check in unchecked.checks
    }
    if reasons:
        yield "<h3>Not checked</h3><ul>"
        for unchecked in examination.unchecked:
            names = ", ".join(unchecked.checks)
            yield f"<li>{charts.escaped(unchecked.reason)}: <small>{charts.escaped(names)}</small></li>"
        yield "</ul>"
    yield '<details><summary>What was checked</summary><table class="checks">'
    for place in _PLACES[examination.kind]:
        for check in by_place()[place]:
            told = "found" if check.name in found else "nothing found"
            # Also one that was found, but not looked for everywhere: of older
            # checkpoints.
            told = "not checked" if check.name in reasons else told
            gravity = check.gravities[0] if told == "found" else ""
            yield (
                f"<tr><td><code>{check.name}</code></td><td>{charts.escaped(check.what)}</td>"
                f'<td><i class="{gravity}">{told}</i></td></tr>'
            )
    yield "</table></details>"
