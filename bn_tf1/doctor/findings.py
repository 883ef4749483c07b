"""What the doctor says: findings, their gravity and how sure they are.

Contract: every check, of a graph, a checkpoint or a training directory, returns
`Finding`s and prints nothing; whoever asked decides how they are shown.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple

# From the gravest on; reports list findings in this order.
GRAVITIES = ("error", "warning", "note")
CERTAINTIES = ("certain", "likely", "possible")


class Finding(NamedTuple):
    """One thing that is wrong, or may be.

    Attributes:
        check: name of the check, in kebab case, such as "update-not-run"; stable
            across versions, so that scripts can select by it.
        gravity: "error" where evaluation is wrong or will be, "warning" where it
            may be, "note" for what is worth knowing.
        certainty: "certain", "likely" or "possible".
        layer: scope of the layer, such as "block1/conv/bn"; "" for a finding about
            the whole graph, checkpoint or directory.
        where: the file, node or variable in which it was found.
        what: what is wrong, with the figures.
        why: why it matters.
        remedy: how to mend it, with the line of code or the command.
    """

    check: str
    gravity: str
    certainty: str
    layer: str
    where: str
    what: str
    why: str
    remedy: str


def by_gravity(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, gravest and surest first, otherwise in their order."""
    # sorted keeps the order of equals: that in which the checks are listed.
    return sorted(
        findings,
        key=lambda finding: (
            GRAVITIES.index(finding.gravity),
            CERTAINTIES.index(finding.certainty),
        ),
    )
