"""What belongs together in a report: findings of one check, and layers that are alike."""

from __future__ import annotations

import os
from typing import Iterable, NamedTuple, Sequence

from bn_tf1.doctor.findings import GRAVITIES, Finding
from bn_tf1.doctor.layer_rows import LayerRow


class LayerGroup(NamedTuple):
    """Layers that one line of a table stands for.

    Attributes:
        name: their name, with a * for what differs.
        rows: the layers.
        gravity: that of the gravest finding on any of them; "" for none.
    """

    name: str
    rows: tuple[LayerRow, ...]
    gravity: str


def findings_by_check(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one check, gravity and certainty together, in their order."""
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        # They share one head, one reason and one remedy.
        key = (finding.check, finding.gravity, finding.certainty)
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def layer_groups(
    rows: Sequence[LayerRow], findings: Iterable[Finding], most: int
) -> list[LayerGroup]:
    """The layers, those alike together if there are more than `most`.

    Alike are layers of one kind, with the same settings and the same findings; how many
    channels they have, and their statistics, may differ.
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for finding in findings:
        found.setdefault(finding.layer, set()).add((finding.check, finding.gravity))
    groups: dict[tuple, list[LayerRow]] = {}
    for i, row in enumerate(rows):
        own = frozenset(found.get(row.name, ()))
        settings = (row.kind, row.decay, row.epsilon, row.mode, row.layout)
        # Few are a group each.
        key = (settings, own) if len(rows) > most else (i, own)
        groups.setdefault(key, []).append(row)
    return [
        LayerGroup(
            pattern([row.name for row in members]), tuple(members), _gravest(own)
        )
        for (_, own), members in groups.items()
    ]


def _gravest(found):
    gravities = {gravity for _, gravity in found}
    return next((gravity for gravity in GRAVITIES if gravity in gravities), "")


def pattern(names: Sequence[str]) -> str:
    """One name for several: what they begin and end with, and * between."""
    if len(set(names)) == 1:
        return names[0]
    start = os.path.commonprefix(list(names))
    rests = [name[len(start) :] for name in names]
    end = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    # In whole parts of a scope: what two last words happen to end with tells nothing.
    end = end[end.index("/") :] if "/" in end else ""
    return f"{start}*{end}"


def common_scope(names: Sequence[str]) -> str:
    """The scope that all `names` are in, with its last slash; "" for none."""
    if len(names) < 2:
        return ""
    start = os.path.commonprefix(list(names))
    # The prefix goes by letters: conv1 and conv2 have conv in common, which is no
    # scope.
    return start[: start.rfind("/") + 1]
