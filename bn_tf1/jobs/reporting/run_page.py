"""The page of a run, `report.html`: self-contained, without a script.

    the last figures, and the flags that were not left at their defaults;
    learning curves of training and evaluation in one chart, the learning rate, the speed;
    for each layer its moving statistics against those of the batch, over the steps;
    the doctor's verdict.

Contract: a run of this project has its own charts first. Of one of another program, every
scalar of its event files is drawn, those of the same tag in different folders in one
chart. Two runs are compared curve by curve.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Iterator, NamedTuple, Sequence

from bn_tf1.doctor.examination import examine
from bn_tf1.doctor.reports import charts
from bn_tf1.doctor.reports.grouping import findings_by_check
from bn_tf1.doctor.reports.terminal import verdict
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.reporting.event_curves import Curves, curves_of
from bn_tf1.jobs.saving import durable_files
from bn_tf1.jobs.summaries import TRAIN_FOLDER

REPORT_FILE = "report.html"

# Titles and vertical axes of what train.py and eval.py measure.
_OWN = {
    "loss": ("Loss", "cross-entropy in nats, without the penalty"),
    "accuracy": ("Accuracy", "share of examples"),
    "accuracy_top5": ("Top-5 accuracy", "share of examples"),
    "learning_rate": ("Learning rate", ""),
    "examples_per_second": ("Speed", "training examples per second"),
    "penalty": ("L2 penalty", "nats"),
}
# Of a layer: title, vertical axis, and its curves by the end of their tag.
_OF_LAYERS = (
    (
        "mean",
        "root mean square",
        {"size_of_moving_mean": "moving", "size_of_batch_mean": "batch"},
    ),
    (
        "deviation",
        "average",
        {"moving_deviation": "moving", "batch_deviation": "batch"},
    ),
    (
        "distance of the batch",
        "means in deviations, variances as |ln| of the ratio",
        {"mean_distance": "means", "variance_distance": "variances"},
    ),
)
# Where a run lies, which its title says, is none, nor is what it found there.
_NO_SETTINGS = ("model_dir", "data_dir", "data_checksum")
_MAX_POINTS, _MAX_LAYER_POINTS = 200, 40
_MAX_CHARTS = 60
_MAX_OPEN_LAYERS = 12

_STYLE = """
h1{overflow-wrap:anywhere}h2{margin:2rem 0 .6rem}
.charts{display:grid;gap:1.2rem 2rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
.small .plot svg,.small .ticks.y{height:7em}.small figcaption{font-size:.88em;
overflow-wrap:anywhere}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:1rem 0}
.facts div{font-size:.85em;color:var(--soft)}
.facts b{display:block;font-size:1.35rem;color:var(--ink)}
.verdict ul{margin:.3em 0;padding-left:1.2em}details{margin:.8em 0}
.settings{border-collapse:collapse;font-size:.88em}.settings td,.settings th{padding:.1em 1.4em .1em 0;text-align:left}
code{overflow-wrap:anywhere}
"""


class RunCurves(NamedTuple):
    """The curves of a run.

    Attributes:
        folder: where it is.
        curves: those of each folder in it, by name; "" for itself.
    """

    folder: str
    curves: dict[str, Curves]


def read_run(folder: str) -> RunCurves:
    """Reads the event files of a run.

    Raises:
        ValueError: there is no such folder, or no event file with a scalar in it.
    """
    if not os.path.isdir(folder):
        what = "a file" if os.path.exists(folder) else "not there"
        raise ValueError(f"{folder} is {what}: give the folder of a run")
    curves = curves_of(folder)
    # The folder above the run is given most often by mistake.
    if not curves:
        inner = [
            os.path.join(folder, name)
            for name in sorted(os.listdir(folder))
            if os.path.isdir(os.path.join(folder, name))
            and curves_of(os.path.join(folder, name))
        ]
        runs = f"; there are runs in it: {', '.join(inner)}" if inner else ""
        raise ValueError(
            f"{folder} has no event file (*tfevents*) with a scalar in it, nor has a "
            f"folder in it{runs}"
        )
    # What lies in the run's own folder is of its training, unless that has one.
    own = "." if TRAIN_FOLDER in curves else TRAIN_FOLDER
    return RunCurves(folder, {name or own: c for name, c in curves.items()})


def write_page(path: str, runs: Sequence[RunCurves]) -> None:
    """Writes the page of one run, or of several to be compared, as a whole.

    Raises:
        OSError: it cannot be written.
    """
    # Somebody may have it open, and load it anew at any moment.
    with durable_files.replacing(path) as file:
        file.write(page(runs).encode("utf-8"))


def page(runs: Sequence[RunCurves]) -> str:
    """The page of one run, or of several to be compared."""
    names = _short_names([run.folder for run in runs])
    # What tells the runs apart, in titles and legends: nothing where there is one.
    named = [*zip(names if len(runs) > 1 else [""], runs)]
    parts = [_facts(name, run) for name, run in named]
    parts += _settings(named)
    curves = "".join(_curve_charts(named))
    parts.append(f'<h2>Learning curves</h2><div class="charts">{curves}</div>')
    parts += _layers(named)
    for name, run in named:
        parts += _verdict(name, run)
    heading = " and ".join(names)
    return charts.document(heading, f"{heading}: training", _STYLE, parts)


def _short_names(folders):
    """The folders without what they have in common in front."""
    paths = [os.path.normpath(folder) for folder in folders]
    if len(paths) == 1:
        return [os.path.basename(os.path.abspath(paths[0]))]
    shared = os.path.commonpath([os.path.abspath(path) for path in paths])
    return [os.path.relpath(os.path.abspath(path), shared) for path in paths]


def _facts(name, run):
    """The last figures of a run, large."""
    facts = []
    for role, tag, words in (
        ("train", "loss", "training loss"),
        ("eval", "loss", "evaluation loss"),
        ("eval", "accuracy", "evaluation accuracy"),
        ("train", "examples_per_second", "examples/s"),
    ):
        points = run.curves.get(role, {}).get(tag)
        if points:
            step, value = points[-1]
            place = f"{words}, step {step}"
            best_step, best = max(points, key=lambda point: point[1])
            if tag == "accuracy" and best > value:
                place += f"; the best {best:.4g}, step {best_step}"
            figure = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            facts.append(f"<div><b>{figure}</b>{charts.escaped(place)}</div>")
    title = f"<h2>{charts.escaped(name)}</h2>" if name else ""
    return title + (f'<div class="facts">{"".join(facts)}</div>' if facts else "")


def _settings(named) -> Iterator[str]:
    """What runs of train.py were started with, where that is not the default of all."""
    try:
        configs = [configuration.load(run.folder) for _, run in named]
    except (ConfigError, OSError):
        return  # a run of another program
    rows = []
    for field in dataclasses.fields(Config):
        values = [getattr(config, field.name) for config in configs]
        if field.name in _NO_SETTINGS or values == [field.default] * len(values):
            continue
        mark = "b" if len(set(values)) > 1 else "span"
        cells = "".join(
            f"<td><{mark}>{charts.escaped(str(v))}</{mark}></td>" for v in values
        )
        rows.append(f"<tr><td><code>--{field.name}</code></td>{cells}</tr>")
    head = "".join(f"<th>{charts.escaped(name)}</th>" for name, _ in named if name)
    yield f"<details{' open' if len(named) > 1 else ''}><summary>Settings</summary>"
    yield f'<table class="settings"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    yield '<p class="soft">All others are the defaults of train.py.</p></details>'


def _curve_charts(named) -> Iterator[str]:
    """A chart for each tag, its curves from all folders of all runs."""
    tags: dict[str, list[charts.Series]] = {}
    for i, (name, run) in enumerate(named):
        for j, (role, curves) in enumerate(_in_order(run.curves)):
            for tag, points in curves.items():
                if _is_of_a_layer(tag):
                    continue
                # Runs of earlier versions say the folder in the tag, too.
                series = _series(name, role, points, 2 * i + j, _MAX_POINTS)
                tags.setdefault(re.sub("^eval/", "", tag), []).append(series)
    own = [tag for tag in _OWN if tag in tags]
    others = sorted(set(tags) - set(own))
    for tag in (own + others)[:_MAX_CHARTS]:
        title, unit = _OWN.get(tag, (tag, ""))
        yield charts.lines(tags[tag], title=title, x_name="step", y_name=unit)
    if len(tags) > _MAX_CHARTS:
        left = ", ".join((own + others)[_MAX_CHARTS:])
        yield f'<p class="soft">Not drawn: {charts.escaped(left)}</p>'


def _in_order(curves):
    """Training first, then evaluation, then what else there is."""
    # The first curve has the first colour: that of training in all charts.
    order = {TRAIN_FOLDER: 0, "eval": 1}
    return sorted(curves.items(), key=lambda item: (order.get(item[0], 2), item[0]))


def _is_of_a_layer(tag):
    """Whether the tag is of a layer's statistics, which have charts of their own."""
    name = tag.rpartition("/")[2]
    return "/" in tag and any(name in kinds for *_, kinds in _OF_LAYERS)


def _series(run, name, points, colour, most):
    """A curve of at most about `most` points, the last among them."""
    stride = -(-len(points) // most)
    name = f"{run}: {name}" if run else name
    kept = [*points[:-1:stride], points[-1]]
    return charts.Series(name, kept, colour=colour % charts.COLOURS)


def _layers(named) -> Iterator[str]:
    """For each layer the moving statistics against those of the batch."""
    # A dict: in the order of the network, in which the curves were first written.
    layers = {
        tag.rpartition("/")[0]: None
        for _, run in named
        for tag in run.curves.get(TRAIN_FOLDER, ())
        if _is_of_a_layer(tag)
    }
    if not layers:
        return
    yield "<h2>Batch-norm layers</h2>"
    yield (
        '<p class="soft">The moving statistics, which evaluation uses, against those of '
        "the batch, over the channels of each layer. Where they stay apart, evaluation "
        "will differ from training.</p>"
    )
    drawn = ["".join(_layer_charts(layer, named)) for layer in layers]
    yield '<div class="charts small">' + "".join(drawn[:_MAX_OPEN_LAYERS]) + "</div>"
    if len(drawn) > _MAX_OPEN_LAYERS:
        rest = "".join(drawn[_MAX_OPEN_LAYERS:])
        count = len(drawn) - _MAX_OPEN_LAYERS
        yield f"<details><summary>{count} more layers</summary>"
        yield f'<div class="charts small">{rest}</div></details>'


def _layer_charts(layer, named) -> Iterator[str]:
    for statistic, unit, kinds in _OF_LAYERS:
        series = []
        for i, (name, run) in enumerate(named):
            curves = run.curves.get(TRAIN_FOLDER, {})
            for j, (tag, kind) in enumerate(kinds.items()):
                points = curves.get(f"{layer}/{tag}")
                if points:
                    colour = 2 * i + j
                    series.append(
                        _series(name, kind, points, colour, _MAX_LAYER_POINTS)
                    )
        if series:
            title = f"{layer}: {statistic}"
            yield charts.lines(series, title=title, x_name="step", y_name=unit)


def _verdict(name, run) -> Iterator[str]:
    """What the doctor says of the run, each check in one line."""
    title = f"The doctor on {name}" if name else "The doctor"
    # Of a run of another program the doctor may know nothing; its curves are drawn anyway.
    try:
        examination = examine(run.folder)
    except ValueError as error:
        yield f"<h2>{charts.escaped(title)}</h2><p>Not examined: {charts.escaped(str(error))}</p>"
        return
    sick = "" if examination.is_healthy else " sick"
    yield f"<h2>{charts.escaped(title)}</h2>"
    yield f'<div class="verdict{sick}"><b>{charts.escaped(verdict([examination]))}</b><ul>'
    for group in findings_by_check(examination.findings):
        first = group[0]
        count = f" ({len(group)} times)" if len(group) > 1 else ""
        yield (
            f"<li>{charts.escaped(first.gravity)}: {charts.escaped(first.check + count)}. "
            f"{charts.escaped(first.what)}</li>"
        )
    yield "</ul></div>"
    command = f"python -m bn_tf1 doctor {run.folder}"
    yield f'<p class="soft">More with <code>{charts.escaped(command)}</code></p>'
