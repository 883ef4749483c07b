"""The doctor's report for programs.

    {"schema": 1,
     "verdict": "healthy" | "findings" | "unreadable",
     "paths": [{"path", "kind", "step", "healthy",
                "layers": [{"name", "kind", "channels", "decay", "epsilon", "mode",
                            "layout", "mean", "deviation", "history"}],
                "findings": [{"check", "gravity", "certainty", "layer", "where", "what",
                              "why", "remedy"}],
                "unchecked": [{"checks": names, "reason"}]}],
     "unreadable": [{"path", "error"}]}

A mean or a deviation is {"step", "quantiles"}: the minimum, 5, 25, 50, 75, 95 % and the
maximum over the channels; a history is a list of {"mean", "deviation"}. What is not known
is null, and so is NaN, which JSON does not have.
"""

from __future__ import annotations

import json
import math
from typing import Sequence

from bn_tf1.doctor.examination import Examination
from bn_tf1.doctor.layer_rows import LayerRow, Spread

SCHEMA = 1


def json_report(
    examinations: Sequence[Examination], unreadable: Sequence[tuple[str, str]] = ()
) -> str:
    """The report as JSON.

    Args:
        examinations: what was found.
        unreadable: (path, error) of the paths that could not be read.
    """
    verdict = "healthy"
    if not all(examination.is_healthy for examination in examinations):
        verdict = "findings"
    report = {
        "schema": SCHEMA,
        "verdict": "unreadable" if unreadable else verdict,
        "paths": [_examination(examination) for examination in examinations],
        "unreadable": [{"path": path, "error": error} for path, error in unreadable],
    }
    # Python would write NaN as it is, which other programs do not read.
    return json.dumps(report, indent=1, allow_nan=False)


def _examination(examination):
    return {
        "path": examination.path,
        "kind": examination.kind,
        "step": examination.step,
        "healthy": examination.is_healthy,
        "layers": [_layer(layer) for layer in examination.layers],
        "findings": [dict(finding._asdict()) for finding in examination.findings],
        "unchecked": [dict(part._asdict()) for part in examination.unchecked],
    }


def _layer(layer: LayerRow):
    return {
        "name": layer.name,
        "kind": layer.kind or None,
        "channels": layer.channels,
        "decay": _number(layer.decay),
        "epsilon": _number(layer.epsilon),
        "mode": layer.mode or None,
        "layout": layer.layout or None,
        "mean": _spread(layer.mean),
        "deviation": _spread(layer.deviation),
        "history": [
            {"mean": _spread(mean), "deviation": _spread(deviation)}
            for mean, deviation in layer.history
        ],
    }


def _spread(spread: Spread | None):
    if spread is None:
        return None
    return {"step": spread.step, "quantiles": [_number(q) for q in spread.quantiles]}


def _number(value):
    return value if value is not None and math.isfinite(value) else None
