"""The doctor's report on a terminal, as wide as that is.

Names come from foreign files: what cannot be printed in them is escaped. Findings of one
check are told once, with all their layers. What all layers have in common stands above
the table, and of many layers those that are alike are one row.
"""

from __future__ import annotations

import collections
import textwrap
from typing import Iterable, Sequence

from bn_tf1.doctor.examination import Examination
from bn_tf1.doctor.findings import GRAVITIES, Finding
from bn_tf1.doctor.layer_rows import LayerRow, Spread
from bn_tf1.doctor.register import BY_NAME, by_place, general_remedy
from bn_tf1.doctor.reports.grouping import (
    LayerGroup,
    common_scope,
    findings_by_check,
    layer_groups,
)

_WIDTH = 96
_LEAST_WIDTH = 40
# So many layers have a row each, and so many places are told of a finding, or, where
# there are more, the first few; unless all are asked for.
_MAX_ROWS = 12
_MAX_LAYERS = 8
_FEW = 3
_LEAST_NAME = 16
# Told in a sentence where they are the same for all layers, or find no room.
_SETTINGS = ("kind", "epsilon", "decay", "mode")
# Parameters of the escape sequence that sets colours (ECMA-48).
_COLOURS = {"error": "1;31", "warning": "33", "note": "36", "good": "1;32", "bold": "1"}


def text_report(
    examinations: Sequence[Examination],
    columns: int = _WIDTH,
    *,
    in_colour: bool = False,
    every_layer: bool = False,
) -> str:
    """The whole report; its last line is the verdict.

    Args:
        examinations: what was found.
        columns: the width of the terminal; no line is longer, up to 96.
        in_colour: whether to colour it with escape sequences.
        every_layer: whether every layer has a row, and every finding a line.
    """
    report = _Report(_text_width(columns), in_colour, every_layer)
    lines = []
    for examination in examinations:
        lines += [*report.examination(examination), ""]
    is_healthy = all(examination.is_healthy for examination in examinations)
    colour = "good" if is_healthy else "error"
    return "\n".join([*lines, report.painted(verdict(examinations), colour)])


def list_of_checks(columns: int = _WIDTH) -> str:
    """Every check of the register, by what it looks at."""
    width = _text_width(columns)
    lines = []
    for place, checks in by_place().items():
        lines += ["", f"in a {place}:"]
        for check in checks:
            lines.append(f"  {check.name} ({' or '.join(check.gravities)})")
            lines += _wrapped("", check.what, width)
    return "\n".join(lines[1:])


def explained(check: str, columns: int = _WIDTH) -> str:
    """All that the register says of a check.

    Raises:
        ValueError: there is no such check; the error names those that sound like it.
    """
    if check not in BY_NAME:
        # People remember how a name begins.
        part = check.split("-")[0].lower()
        alike = [known for known in BY_NAME if part and part in known]
        raise ValueError(
            f"there is no check {check!r}: "
            + (f"is it {' or '.join(alike)}? " if alike else "")
            + "python -m bn_tf1 doctor --list lists them all"
        )
    entry, width = BY_NAME[check], _text_width(columns)
    return "\n".join(
        [
            *_wrapped("check", f"{entry.name}, in a {entry.looks_at}", width),
            *_wrapped("gravity", " or ".join(entry.gravities), width),
            *_wrapped("what", entry.what, width),
            *_wrapped("why", entry.why, width),
            *_wrapped("remedy", general_remedy(entry), width),
        ]
    )


def _text_width(columns):
    return max(_LEAST_WIDTH, min(columns, _WIDTH))


def verdict(examinations: Sequence[Examination]) -> str:
    """The report in one line."""
    layers = sum(len(examination.layers) for examination in examinations)
    findings = [f for examination in examinations for f in examination.findings]
    is_healthy = all(examination.is_healthy for examination in examinations)
    counted = counts(findings)
    told = f"{plural(layers, 'batch-norm layer')}, {counted or 'no findings'}"
    return f"{'healthy' if is_healthy else 'not healthy'}: {told}"


def counts(findings: Iterable[Finding]) -> str:
    """As "1 error, 2 warnings"; "" for none."""
    by_gravity = collections.Counter(finding.gravity for finding in findings)
    return ", ".join(
        plural(by_gravity[gravity], gravity)
        for gravity in GRAVITIES
        if by_gravity[gravity]
    )


def printable(text: str) -> str:
    """`text` without what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """A figure as the table shows it."""
    return "" if value is None else f"{value:.4g}"


def plural(count: int, noun: str) -> str:
    """As "1 layer", "2 layers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def told_mode(row: LayerRow) -> str:
    """The mode of a layer; "" where it is not known."""
    return "" if row.mode == "unknown" else row.mode


def places_by_text(findings: Iterable[Finding], path: str) -> dict[str, list[str]]:
    """By what is wrong, where it is: "layer: variable"; `path` was told already."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        place = finding.where
        if place.startswith(path):
            place = place[len(path) :].lstrip(":/ ")
        if finding.layer:
            place = place.replace(f"{finding.layer}/", "")
        told = ": ".join(filter(None, (finding.layer, place)))
        found.setdefault(finding.what, []).append(told)
    return found


class _Report:
    """Writes the parts of one report."""

    def __init__(self, width, in_colour, every_layer):
        self._width = width
        self._in_colour = in_colour
        self._every = every_layer

    def painted(self, text, colour):
        if not self._in_colour or colour not in _COLOURS:
            return text
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"

    def examination(self, examination):
        step = "" if examination.step is None else f", step {examination.step}"
        title = printable(f"{examination.path}: {examination.kind}{step}")
        yield from (self.painted(line, "bold") for line in self._folded(title))
        if examination.layers:
            yield from self._table(examination)
        else:
            yield "  no batch-norm layer"
        for group in findings_by_check(examination.findings):
            yield ""
            yield from self._findings(group, examination.path)
        yield from self._unchecked(examination)

    def _folded(self, text, indent="  "):
        return textwrap.wrap(
            text, self._width, subsequent_indent=indent, break_on_hyphens=False
        )

    def _table(self, examination):
        most = len(examination.layers) if self._every else _MAX_ROWS
        groups = layer_groups(examination.layers, examination.findings, most)
        scope = common_scope([group.name for group in groups])
        table = _Table(groups, scope, self._width - 2)
        layers = plural(len(examination.layers), "batch-norm layer")
        told = [f"{layers} in {scope}" if scope else layers, *table.in_common]
        yield from self._folded("  " + printable(", ".join(told)))
        yield ""
        yield "  " + table.header
        for group, lines in table.rows():
            # Where there is no colour, a mark tells.
            mark = "! " if group.gravity in ("error", "warning") else "  "
            for line in lines:
                yield self.painted(mark + line, group.gravity if mark.strip() else "")
        if any(len(group.rows) > 1 for group in groups):
            yield "  layers that are alike are one row; --all shows each"

    def _findings(self, group, path):
        first = group[0]
        times = f", {len(group)} times" if len(group) > 1 else ""
        head = f"{first.gravity} ({first.certainty}): {first.check}{times}"
        yield self.painted(printable(head), first.gravity)
        are_many = len(group) > _MAX_LAYERS and not self._every
        told = group[:_FEW] if are_many else group
        for what, places in places_by_text(told, path).items():
            for place in places:
                yield from _wrapped("where", place, self._width)
            yield from _wrapped("what", what, self._width)
        if are_many:
            left = len({finding.layer for finding in group[_FEW:]})
            more = f"... and {plural(left, 'more layer')}; --all lists each"
            yield from _wrapped("", more, self._width)
        yield from _wrapped("why", first.why, self._width)
        yield from _wrapped("remedy", first.remedy, self._width)

    def _unchecked(self, examination):
        if examination.unchecked:
            yield ""
        for checks, reason in examination.unchecked:
            names = ", ".join(checks)
            if len(checks) > 3:
                names = f"{len(checks)} checks ({', '.join(checks[:2])}, ...)"
            yield from self._folded(printable(f"not checked: {names}: {reason}"))


class _Table:
    """The rows of layers, cut to a width; what is the same in all stands above them."""

    def __init__(self, groups: Sequence[LayerGroup], scope: str, width: int):
        self._groups = groups
        self._width = width
        # Layers of one graph share the name of their network: it stands above them.
        names = [printable(g.name[len(scope) :]) or "(no scope)" for g in groups]
        columns = {
            "n": [f"{len(g.rows)}" if len(g.rows) > 1 else "" for g in groups],
            "C": [_channels(group.rows) for group in groups],
            "kind": [printable(group.rows[0].kind) for group in groups],
            "decay": [number(group.rows[0].decay) for group in groups],
            "epsilon": [number(group.rows[0].epsilon) for group in groups],
            "mode": [printable(told_mode(group.rows[0])) for group in groups],
            "mean": [_range([row.mean for row in group.rows]) for group in groups],
            "deviation": [_range([r.deviation for r in g.rows]) for g in groups],
        }
        # Each begins with its title, and all that is in it is of one width.
        self._columns = {}
        for title, values in columns.items():
            if any(values):
                size = max(map(len, (title, *values)))
                self._columns[title] = [x.ljust(size) for x in (title, *values)]
        longest = max(map(len, names))
        wanted = min(longest, _LEAST_NAME)
        self.in_common: list[str] = []
        # Settings make room first, then the statistics: the name must tell the layer.
        for title in _SETTINGS:
            values = [value.strip() for value in self._columns.get(title, ())[1:]]
            is_common = len(groups) > 1 and len(set(values)) == 1
            if values and (is_common or self._left_for_names() < wanted):
                del self._columns[title]
                told = list(dict.fromkeys(filter(None, values)))
                self.in_common.append(f"{title} {' or '.join(told[:4])}")
        for title in ("deviation", "mean"):
            least = len("layer")
            if self._left_for_names() < least and self._columns.pop(title, None):
                self.in_common.append(f"no room for the {title}")
        self._names = names
        self._name = max(min(longest, self._left_for_names()), len("layer"))

    def _left_for_names(self):
        return self._width - sum(len(title) + 2 for title, *_ in self._columns.values())

    @property
    def header(self) -> str:
        """The line of titles."""
        return self._line("layer", 0)

    def rows(self):
        """(group, lines) of each row; a name that would not be told apart has a line."""
        short = [_cut_in_front(name, self._name) for name in self._names]
        for i, (group, name) in enumerate(zip(self._groups, self._names)):
            if short.count(short[i]) > 1 and short[i] != name:
                name = _cut_in_front(name, self._width)
                yield group, [name, self._line("", i + 1)]
            else:
                yield group, [self._line(short[i], i + 1)]

    def _line(self, name, row):
        cells = [column[row] for column in self._columns.values()]
        return "  ".join([name.ljust(self._name), *cells]).rstrip()


def _cut_in_front(name, width):
    return name if len(name) <= width else "..." + name[3 - width :]


def _channels(rows):
    sizes = sorted({row.channels for row in rows if row.channels is not None})
    # The first and the last, which may be one.
    return "..".join(str(size) for size in dict.fromkeys(sizes[:1] + sizes[-1:]))


def _range(spreads: Sequence[Spread | None]) -> str:
    known = [spread.quantiles for spread in spreads if spread is not None]
    if not known:
        return ""
    return f"{min(q[0] for q in known):.3g}..{max(q[-1] for q in known):.3g}"


def _wrapped(label, text, width):
    return textwrap.wrap(
        printable(text),
        width,
        initial_indent=f"  {label:<8}",
        subsequent_indent=" " * 10,
        # A path, a name or a piece of code is copied from here: it stays whole.
        break_long_words=False,
        break_on_hyphens=False,
    )
