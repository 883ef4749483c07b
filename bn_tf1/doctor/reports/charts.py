"""Charts for pages that stand alone: drawn with SVG and CSS, no script, no network.

    axis = axis_of([-3.1, 0.2, 4.0])
    lines([Series("training", [(0, 2.3), (100, 0.4)])], axes..., title="loss")

Contract: a chart is as wide as what is around it, from 200 pixels on. Curves and boxes are
stretched with it; text is not, since it is HTML beside the drawing and no part of it. The
colours are those of `STYLE`, for light and for dark pages; they are told apart by people
who do not see red and green (Okabe & Ito, 2008). All texts are escaped here.
"""

from __future__ import annotations

import datetime
import html
import math
from typing import Iterable, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.version import VERSION

# Largest over usual magnitude from which an axis is no longer linear.
_WIDE = 40.0
_HUGE = 1e290
# Labels of an axis are at least so far apart, as a share of it.
_ROOM = 0.13
COLOURS = 6
# Drawings are so many units wide, and charts so many high, before they are stretched.
_SIDE = 1000

STYLE = """
:root{--bg:#fff;--ink:#1c2430;--soft:#5a6675;--rule:#d9dfe6;--panel:#f5f7f9;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b3558c;--c4:#a36c00;--c5:#2f86b8;
--error:#b3261e;--warning:#8a5a00;--note:#44546a;--good:#1b6e3c;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e4e8ed;--soft:#9aa7b5;
--rule:#333c46;--panel:#1d2329;--c0:#56b4e9;--c1:#ff9a52;--c2:#3ecf9e;--c3:#e394c4;
--c4:#e6b84d;--c5:#8fd0f2;--error:#ff8a80;--warning:#f0b24a;--note:#a9b8c8;
--good:#6fd391}}
.chart{margin:0;min-width:0}.chart figcaption{font-weight:600;margin-bottom:.3em}
.plot{position:relative;margin:0 .8em 0 4em}
.plot svg{display:block;width:100%;height:11em;border:1px solid var(--rule)}
.plot path{fill:none}.plot path,.box path{vector-effect:non-scaling-stroke}
.plot .grid{stroke:var(--rule)}.plot .band{stroke:none;opacity:.18}
.plot .dot{stroke-width:7px;stroke-linecap:round}
.plot .line{stroke-width:1.6px}.plot .faint{stroke-width:1px;opacity:.55}
.plot .line:hover,.plot .faint:hover{stroke-width:4px;opacity:1}
.ticks span{position:absolute;font-size:.75em;color:var(--soft);white-space:nowrap}
.ticks.y{position:absolute;inset:0 0 auto 0;height:11em}
.ticks.y span{right:calc(100% + .5em);transform:translateY(50%)}
.ticks.x{position:relative;height:1.2em}.ticks.x span{transform:translateX(-50%)}
.unit{font-size:.75em;color:var(--soft);text-align:center;margin:.2em 0 .6em}
.keys{font-size:.8em;color:var(--soft);margin:0 0 .6em;padding:0}
.keys span{margin-right:1.2em;white-space:nowrap}
.keys i{display:inline-block;width:1.4em;height:0;border-top:3px solid;
vertical-align:middle;margin-right:.4em}
.box{display:block;width:100%;height:1.15em}
.box path{stroke:var(--c0);fill:var(--c0);fill-opacity:.25}
.box .m{stroke:var(--ink);stroke-width:2px}
""" + "".join(
    f".s{i}{{stroke:var(--c{i});color:var(--c{i})}}.f{i}{{fill:var(--c{i})!important}}\n"
    for i in range(COLOURS)
)
# What pages have in common, and how they fit a narrow window.
_PAGE_STYLE = """
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:78rem;padding:1.2rem;color:var(--ink);background:var(--bg)}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem}p{margin:.3em 0}.soft{color:var(--soft)}
.verdict{padding:.6em .9em;border-radius:.4em;background:var(--panel);
border-left:.4em solid var(--good)}.verdict.sick{border-color:var(--error)}
summary{cursor:pointer;color:var(--soft)}
@media(max-width:44rem){body{padding:.8rem}.plot{margin-left:3.4em}}
"""


class Axis(NamedTuple):
    """A scale from numbers to shares of an axis.

    Attributes:
        low, high: its ends; low < high.
        unit: None for a linear scale. Otherwise it is linear up to about `unit` from 0
            and logarithmic beyond, on either side.
    """

    low: float
    high: float
    unit: float | None = None

    def share(self, value: float) -> float:
        """The place of `value`, 0 at the low end and 1 at the high one."""
        low, here, high = (self._bent(v) for v in (self.low, value, self.high))
        return min(max((here - low) / (high - low), 0.0), 1.0)

    def _bent(self, value):
        if self.unit is None:
            return value
        size = math.log10(1 + min(abs(value), _HUGE) / self.unit)
        return math.copysign(size, value)

    def ticks(self) -> list[float]:
        """Round numbers to write beside the axis, far enough from each other."""
        taken: list[float] = []
        for value in self._round_numbers():
            place = self.share(value)
            is_free = all(abs(place - self.share(other)) >= _ROOM for other in taken)
            if self.low <= value <= self.high and is_free:
                taken.append(value)
        return sorted(taken)

    def _round_numbers(self):
        if self.unit is None:
            step = _nice((self.high - self.low) / 5)
            first = math.ceil(self.low / step)
            return [i * step for i in range(first, math.floor(self.high / step) + 1)]
        largest = max(abs(self.low), abs(self.high))
        last = math.floor(math.log10(min(largest, _HUGE)))
        powers = range(last, math.floor(math.log10(self.unit)) - 1, -1)
        return [0.0] + [sign * 10.0**power for power in powers for sign in (1, -1)]


def document(heading: str, title: str, style: str, parts: Iterable[str]) -> str:
    """A page of its own: `heading`, when it was made and by what, and the parts.

    `style` is added to what all pages have.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    made = f"{now:%Y-%m-%d %H:%M} UTC, bn_tf1 {VERSION}, TensorFlow "
    head = (
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title>",
        f"<style>{STYLE}{_PAGE_STYLE}{style}</style></head>",
        f"<body><h1>{escaped(heading)}</h1>",
        f'<p class="soft">{escaped(made + tf.version.VERSION)}</p>',
    )
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def axis_of(values: Iterable[float], *, holds_zero: bool = True) -> Axis:
    """The axis that shows all finite `values`: linear, or bent where they are far apart.

    Args:
        values: numbers; what is not finite is left out.
        holds_zero: whether 0 is to be seen, too.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    if holds_zero or not finite:
        finite.append(0.0)
    low, high = min(finite), max(finite)
    sizes = sorted(abs(value) for value in finite if value)
    usual = sizes[len(sizes) // 2] if sizes else 1.0
    if sizes and (sizes[-1] > _WIDE * usual or sizes[-1] > _HUGE):
        unit = 10.0 ** math.floor(math.log10(min(usual, _HUGE)))
        return Axis(low, high, unit) if low < high else Axis(low - unit, low + unit)
    if low == high:
        margin = abs(low) or 1.0
        return Axis(low - margin / 2, high + margin / 2)
    margin = (high - low) * 0.04
    return Axis(low and low - margin, high and high + margin)


def _nice(step):
    """The least of 1, 2 and 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


class Series(NamedTuple):
    """A curve.

    Attributes:
        name: what it shows; "" for none.
        points: (x, y); what is not finite breaks the curve.
        band: (x, low, high) around it.
        colour: 0 to 5.
        is_faint: whether it is one of many.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    colour: int = 0
    is_faint: bool = False


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_name: str,
    y_name: str = "",
    has_legend: bool = True,
) -> str:
    """A chart of curves over one horizontal axis, such as the step.

    Args:
        series: the curves.
        title: its title.
        x_name, y_name: what the axes count, with the unit.
        has_legend: whether the curves that are not faint are named, if there are several.
    """
    x = axis_of([p[0] for s in series for p in s.points], holds_zero=False)
    heights = [p[1] for s in series for p in s.points]
    heights += [height for s in series for _, *both in s.band for height in both]
    y = axis_of(heights, holds_zero=False)
    drawing = [_grid(x, y)] + [_curve(one, x, y) for one in series]
    named = [one for one in series if has_legend and one.name and not one.is_faint]
    keys = "".join(
        f'<span><i class="s{one.colour}"></i>{escaped(one.name)}</span>'
        for one in named
    )
    return (
        f'<figure class="chart"><figcaption>{escaped(title)}</figcaption>'
        + (f'<p class="keys">{keys}</p>' if len(named) > 1 else "")
        + f'<div class="plot">{labels(y, "y")}'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(title)}">{"".join(drawing)}</svg>{labels(x, "x")}</div>'
        f'<p class="unit">{escaped(x_name)}{y_name and "; " + escaped(y_name)}</p>'
        "</figure>"
    )


def labels(axis: Axis, side: str) -> str:
    """The numbers beside an axis; `side` is "x" or "y"."""
    edge = "left" if side == "x" else "bottom"
    spans = [
        f'<span style="{edge}:{100 * axis.share(tick):.4g}%">{_number(tick)}</span>'
        for tick in axis.ticks()
    ]
    return f'<div class="ticks {side}">{"".join(spans)}</div>'


def _number(value):
    text = f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def _grid(x, y):
    parts = [f"M{_place(x, tick)} 0V{_SIDE}" for tick in x.ticks()]
    parts += [f"M0 {_SIDE - _place(y, tick)}H{_SIDE}" for tick in y.ticks()]
    return f'<path class="grid" d="{"".join(parts)}"/>'


def _place(axis, value):
    return round(_SIDE * axis.share(value))


def _curve(series, x, y):
    drawn = ""
    band = [b for b in series.band if all(map(math.isfinite, b))]
    if len(band) > 1:
        corners = [(at, low) for at, low, _ in band]
        corners += [(at, high) for at, _, high in reversed(band)]
        drawn = f'<path class="band f{series.colour}" d="{_path(corners, x, y)}Z"/>'
    kind = "faint" if series.is_faint else "line"
    title = f"<title>{escaped(series.name)}</title>" if series.name else ""
    shape = _path(series.points, x, y)
    if len(series.points) == 1 and shape:
        # One point has no line: a stroke of no length with round ends is a dot.
        kind, shape = "dot", shape + "h0"
    return f'{drawn}<path class="{kind} s{series.colour}" d="{shape}">{title}</path>'


def _path(points, x, y):
    parts, pen = [], "M"
    for at, height in points:
        if not (math.isfinite(at) and math.isfinite(height)):
            pen = "M"
            continue
        parts.append(f"{pen}{_place(x, at)} {_SIDE - _place(y, height)}")
        pen = " "  # more places after an M are joined to it by lines
    return "".join(parts)


def box(quantiles: Sequence[float], axis: Axis, title: str) -> str:
    """A distribution in one line: `quantiles` are 0, 5, 25, 50, 75, 95 and 100 %.

    A line from 5 to 95 %, a box of the quartiles, a bar at the median, and short bars
    at the extremes. What lies behind it is the matter of `rules`.
    """
    if not all(map(math.isfinite, quantiles)):
        return ""
    low, five, first, median, third, most, high = (
        _place(axis, quantile) for quantile in quantiles
    )
    return (
        f'<svg class="box" viewBox="0 0 {_SIDE} 20" preserveAspectRatio="none">'
        f"<title>{escaped(title)}</title>"
        f'<path d="M{five} 10H{most}M{low} 7V13M{high} 7V13M{first} 3H{third}V17H{first}Z"'
        f'/><path class="m" d="M{median} 2V18"/></svg>'
    )


def rules(axis: Axis) -> str:
    """A background of CSS with a thin line at each tick, for what is drawn over it."""
    line = "linear-gradient(var(--rule),var(--rule)) no-repeat {:.4g}%/1px 100%"
    return ",".join(line.format(100 * axis.share(tick)) for tick in axis.ticks())


def escaped(text: str) -> str:
    """`text` for a page, without what is not printable."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return html.escape(printable)
