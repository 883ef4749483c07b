"""The doctor's report on a terminal; its table is at most 100 columns wide.

Names come from foreign files: what cannot be printed in them is escaped. Findings of one
check are told once, with all their layers; a long table shows the layers that something
was found in, and counts the others.
"""

from __future__ import annotations

import collections
import textwrap
from typing import Iterable, Sequence

from bn_tf1.doctor.examination import Examination, LayerRow, Spread
from bn_tf1.doctor.findings import GRAVITIES, Finding
from bn_tf1.doctor.register import by_place, explanation

_WIDTH = 96
_LEAST_WIDTH = 40
_NAME_WIDTH = 36
_MAX_ROWS = 24
_MAX_LAYERS = 8
_HEADER = ("layer", "kind", "C", "decay", "epsilon", "mode", "mean", "deviation")


def text_report(examinations: Sequence[Examination], columns: int = _WIDTH) -> str:
    """The whole report; its last line is the verdict.

    Args:
        examinations: what was found.
        columns: the width of the terminal, to which the findings are folded.
    """
    width = _text_width(columns)
    lines = []
    for examination in examinations:
        lines += [*_examination(examination, width), ""]
    return "\n".join([*lines, verdict(examinations)])


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
        ValueError: there is no such check.
    """
    width = _text_width(columns)
    return "\n".join(
        line for part in explanation(check) for line in _wrapped(*part, width)
    )


def _text_width(columns):
    return max(_LEAST_WIDTH, min(columns, _WIDTH))


def verdict(examinations: Sequence[Examination]) -> str:
    """The report in one line."""
    layers = sum(len(examination.layers) for examination in examinations)
    findings = [f for examination in examinations for f in examination.findings]
    is_healthy = all(examination.is_healthy for examination in examinations)
    counted = counts(findings)
    told = f"{_plural(layers, 'batch-norm layer')}, {counted or 'no findings'}"
    return f"{'healthy' if is_healthy else 'not healthy'}: {told}"


def counts(findings: Iterable[Finding]) -> str:
    """As "1 error, 2 warnings"; "" for none."""
    by_gravity = collections.Counter(finding.gravity for finding in findings)
    return ", ".join(
        _plural(by_gravity[gravity], gravity)
        for gravity in GRAVITIES
        if by_gravity[gravity]
    )


def printable(text: str) -> str:
    """`text` without what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """A figure as the table shows it."""
    return "" if value is None else f"{value:.4g}"


def _plural(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _examination(examination, width):
    step = "" if examination.step is None else f", step {examination.step}"
    yield printable(f"{examination.path}: {examination.kind}{step}")
    if examination.layers:
        yield ""
        yield from _table(examination)
    else:
        yield "  no batch-norm layer"
    for group in _groups(examination.findings):
        yield ""
        yield from _findings(group, width)


def _table(examination):
    rows = examination.layers
    sick = {finding.layer for finding in examination.findings}
    left_out = 0
    if len(rows) > _MAX_ROWS:
        shown = [row for row in rows if row.name in sick][:_MAX_ROWS]
        left_out, rows = len(rows) - len(shown), shown
    cells = [_HEADER] + [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    for line in cells if rows else ():
        padded = [text.ljust(width) for text, width in zip(line, widths)]
        yield "  " + "  ".join(padded).rstrip()
    if left_out:
        healthy = sum(row.name not in sick for row in examination.layers)
        yield f"  {left_out} more layers, {healthy} of all without a finding"


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        _shortened(printable(row.name)) or "(no scope)",
        printable(row.kind),
        "" if row.channels is None else str(row.channels),
        number(row.decay),
        number(row.epsilon),
        "" if row.mode == "unknown" else printable(row.mode),
        _range(row.mean),
        _range(row.deviation),
    )


def _shortened(name):
    if len(name) <= _NAME_WIDTH:
        return name
    head = _NAME_WIDTH // 3
    return f"{name[:head]}...{name[head + 3 - _NAME_WIDTH :]}"


def _range(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.quantiles[0]:.3g} .. {spread.quantiles[-1]:.3g}"


def _groups(findings):
    """Findings of one check, gravity and certainty together, in their order."""
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        key = (finding.check, finding.gravity, finding.certainty)
        groups.setdefault(key, []).append(finding)
    return groups.values()


def _findings(group, width):
    first = group[0]
    count = f", {len(group)} times" if len(group) > 1 else ""
    yield printable(f"{first.gravity} ({first.certainty}): {first.check}{count}")
    for finding in group[:_MAX_LAYERS]:
        yield from _wrapped("where", _place(finding), width)
        yield from _wrapped("what", finding.what, width)
    if len(group) > _MAX_LAYERS:
        layers = len({finding.layer for finding in group[_MAX_LAYERS:]})
        yield from _wrapped(
            "", f"... and {_plural(layers, 'more layer')}; --json lists all", width
        )
    yield from _wrapped("why", first.why, width)
    yield from _wrapped("remedy", first.remedy, width)


def _place(finding):
    return f"{finding.layer} in {finding.where}" if finding.layer else finding.where


def _wrapped(label, text, width):
    return textwrap.wrap(
        printable(text),
        width,
        initial_indent=f"  {label:<8}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
