"""Watches the moving statistics while somebody's own training runs, of any library.

    with tf.train.MonitoredTrainingSession(hooks=[bn_tf1.StatisticsHook()]) as session:
        ...
    bn_tf1.check_statistics(session, step, feed_dict)  # in a loop without hooks

What is said, each once for a layer, as a warning of TensorFlow's log:

    stand still     the same bits at two looks, though the layer used batch statistics
    not finite      a moving statistic is NaN or infinite
    far             two looks in a row, a mean further from that of the batch than one
                    deviation and chance, or a variance more than four times as large or
                    as small, though the average has forgotten its initial value
    not converged   at the end: decay^steps of the initial values is still there

Contract: what a look fetches is computed by the training step anyway, or is a moment of
what that computes; nothing that the step does not run is run, so nothing needs to be fed
for it. Layers in inference mode, and those in loops and functions, are left out.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import check_session
from bn_tf1.doctor.register import BY_NAME, general_remedy
from bn_tf1.population.measured_layers import MeasuredLayer, layers_of
from bn_tf1.population.variable_cells import lack_of_values_told, runs_before

# A tuple, as in `built_layers`: what has a string for a key is written with the graph.
_WATCH_KEY = ("bn_tf1_statistics_watch",)
_RESIDUAL = 0.05
_FAR_RATIO = math.log(4.0)
_MOST_NAMES = 4
# A probe adds some moments and sizes to a run, no layer of the network.
_MOST_ADDED = 30
# Those that must be fed; one with a default need not be.
_PLACEHOLDERS = ("Placeholder", "PlaceholderV2")


class StatisticsReading(NamedTuple):
    """How far the statistics of one layer are apart, at one look.

    Attributes:
        layer: its name.
        mean_distance: the root mean square over the channels of batch mean minus moving
            mean, in moving deviations.
        variance_distance: the mean over the channels of |ln| of the ratio of the batch
            variance to the moving one.
    """

    layer: str
    mean_distance: float
    variance_distance: float


def check_statistics(
    session: tf.Session, step: int, feed_dict: Mapping[Any, Any] | None = None
) -> tuple[StatisticsReading, ...]:
    """Looks at the layers of the graph of `session`, once in a while in a training loop.

    It computes the batch statistics for `feed_dict` without a training step; where
    updates are made in place, they run. The graph must not be finalized before the first
    call, or the statistics are computed in NumPy from what is normalised.

    Args:
        session: a session on the graph, with its variables initialised.
        step: how many steps have been made.
        feed_dict: a feed of a training step, with its mode.

    Returns:
        One reading for each layer that used batch statistics.

    Raises:
        TypeError: `session` is none.
        ValueError: a variable has no value yet.
    """
    check_session(session)
    watch = _watch_of(session.graph)
    fed = _elements(session.graph, feed_dict or ())
    probes = watch.probes(
        lambda tensors: (
            not any(op.type in _PLACEHOLDERS for op in runs_before(tensors, fed))
        )
    )
    with lack_of_values_told():
        values = session.run([probe.tensors() for _, probe in probes], feed_dict)
    return watch.look(session, step, probes, values)


class StatisticsHook(tf.train.SessionRunHook):
    """A look at the statistics every so many steps of a MonitoredTrainingSession.

    It works with Estimator and slim's loop where they take hooks. Between two looks a
    step costs nothing; a look costs as much as fetching the batch statistics of it.
    """

    def __init__(self, *, every_steps: int = 100, output_dir: str | None = None):
        """Looks at the first step and then at every `every_steps`-th.

        Args:
            every_steps: steps from one look to the next, 1 or more.
            output_dir: folder for summaries of the distances of each layer; None for
                none.

        Raises:
            ValueError: `every_steps` is less than 1.
        """
        if every_steps < 1:
            raise ValueError(f"`every_steps` is {every_steps!r}, but must be >= 1")
        self._every_steps = every_steps
        self._output_dir = output_dir
        self._said: set = set()

    def begin(self) -> None:
        self._graph = tf.get_default_graph()
        self._watch = _watch_of(self._graph)
        self._watch.says_no_more_of(self._said)
        self._global_step = tf.train.get_global_step(self._graph)
        self._known: dict = {}
        self._runs = 0

    def before_run(self, run_context: Any) -> Any:
        self._probes = None
        self._runs += 1
        if (self._runs - 1) % self._every_steps:
            return None
        self._probes = self._probes_of(run_context.original_args)
        return tf.train.SessionRunArgs([p.tensors() for _, p in self._probes])

    def after_run(self, run_context: Any, run_values: Any) -> None:
        # Most steps: nothing was asked for.
        if self._probes is None:
            return
        session = run_context.session
        # After the run, as the statistics are read.
        step = self._step_of(session)
        readings = self._watch.look(session, step, self._probes, run_values.results)
        if self._output_dir is not None and readings:
            # TensorFlow's hooks share one writer for each folder, too.
            writer = tf.summary.FileWriterCache.get(self._output_dir)
            writer.add_summary(_summary(readings), step)

    def end(self, session: tf.Session) -> None:
        self._watch.judge_the_end(self._step_of(session))
        if self._output_dir is not None:
            tf.summary.FileWriterCache.get(self._output_dir).flush()

    def _step_of(self, session):
        # Where gradients are accumulated, not each run is a step that moves statistics.
        if self._global_step is not None:
            return int(session.run(self._global_step))
        return self._runs

    def _probes_of(self, arguments):
        """The probes of what this run computes; looked for once for each kind of run."""
        fetched = _elements(self._graph, _flat(arguments.fetches))
        fed = _elements(self._graph, arguments.feed_dict or ())
        key = tuple(e.name for e in fetched), frozenset(t.name for t in fed)
        if key not in self._known:
            tensors = [t for e in fetched for t in getattr(e, "outputs", [e])]
            # What the step runs anyway: for its tensors, its operations, and what these
            # take.
            run = runs_before(tensors, fed)
            run |= {e for e in fetched if isinstance(e, tf.Operation)}
            run |= runs_before([t for op in run for t in op.inputs], fed)
            self._known[key] = self._watch.probes(
                lambda probed: _adds_little(runs_before(probed, fed) - run)
            )
        return self._known[key]


def _watch_of(graph):
    """The watch of `graph`, which remembers what it saw and said."""
    collection = graph.get_collection_ref(_WATCH_KEY)
    if not collection:
        collection.append(_Watch(graph))
    return collection[0]


class _Watch:
    """The layers of a graph, what they were at the last look, and what was said."""

    def __init__(self, graph: tf.Graph):
        self._layers = [
            layer
            for layer in layers_of(graph)
            if layer.moving and any(call.probe for call in layer.calls)
        ]
        # By name: the layer, the step at which it was seen in training, its statistics.
        self._seen: dict = {}
        self._was_far: set = set()
        self._said: set = set()

    def says_no_more_of(self, said: set) -> None:
        """Of what is in `said`, which takes up all that is said from now on.

        An Estimator builds a graph each time that it trains.
        """
        said |= self._said
        self._said = said

    def probes(self, may_run: Any) -> list:
        """(layer, probe) of the first call of each layer whose tensors `may_run`."""
        found = []
        for layer in self._layers:
            probes = [call.probe for call in layer.calls if call.probe]
            fitting = [probe for probe in probes if may_run(probe.tensors())]
            # All calls move the same statistics: one look tells.
            found += [(layer, probe) for probe in fitting[:1]]
        return found

    def look(self, session: Any, step: int, probes: list, values: list) -> tuple:
        """Judges what was fetched at `step`; the readings of what was in training."""
        batches = [
            (layer, probe.batch(fetched))
            for (layer, probe), fetched in zip(probes, values)
        ]
        # A run for another bank of the layer has no values for this one.
        batches = [(layer, batch) for layer, batch in batches if batch and batch.count]
        moving = session.run([[c.value for c in x.moving] for x, _ in batches])
        kinds: dict = {"still": [], "not-finite": [], "far": []}
        readings = []
        for (layer, batch), now in zip(batches, moving):
            # Nothing else can be said of such statistics.
            if not all(np.all(np.isfinite(value)) for value in now):
                kinds["not-finite"].append(layer.name)
                continue
            _, earlier, before = self._seen.get(layer.name, (layer, step, now))
            if earlier < step and all(map(np.array_equal, before, now)):
                kinds["still"].append(layer.name)
            self._seen[layer.name] = layer, step, now
            reading = _reading(layer, batch, now)
            readings.append(reading)
            is_far = self._is_far(layer, batch, reading, step)
            # What stands still is far, too; its reason is the first.
            if is_far and layer.name not in kinds["still"]:
                kinds["far"].append(layer.name)
        for kind, names in kinds.items():
            self._say(kind, names, step)
        return tuple(readings)

    def _is_far(self, layer, batch, reading, step):
        """Whether it is now, and was at the look before; not while it converges."""
        # While the initial value weighs, it is far without a fault.
        if _residual(layer, step) > _RESIDUAL or ("still", layer.name) in self._said:
            return False
        # The mean of N values is off by 1 / sqrt(N) deviations; three of these are rare.
        chance = 3.0 / math.sqrt(max(batch.count, 1.0))
        is_far = (
            reading.mean_distance > 1.0 + chance
            or reading.variance_distance > _FAR_RATIO + 3.0 * chance
        )
        # Once is chance, or a batch that is unlike the others.
        was_far = layer.name in self._was_far
        (self._was_far.add if is_far else self._was_far.discard)(layer.name)
        return is_far and was_far

    def judge_the_end(self, step: int) -> None:
        """Says which averages have not forgotten their initial values after `step`."""
        names = [
            name
            for name, (layer, _, _) in self._seen.items()
            if _residual(layer, step) > _RESIDUAL and ("still", name) not in self._said
        ]
        self._say("not-converged", names, step)

    def _say(self, kind, names, step):
        new = [name for name in names if (kind, name) not in self._said]
        self._said.update((kind, name) for name in new)
        if not new:
            return
        listed = ", ".join(new[:_MOST_NAMES])
        if len(new) > _MOST_NAMES:
            listed += f" and {len(new) - _MOST_NAMES} more"
        tf.logging.warning(
            "batch norm, step %d: the moving statistics of %s %s",
            step,
            listed,
            _TEXTS[kind],
        )


def _text(what, check):
    return f"{what}. {BY_NAME[check].why} {general_remedy(BY_NAME[check])}"


_TEXTS = {
    "still": _text("stand still: nobody runs their updates", "statistics-stand-still"),
    "not-finite": _text("are not finite", "not-finite"),
    "not-converged": _text(
        "are still their initial values in part: the run was too short for the decay",
        "not-converged",
    ),
    "far": "lie far from those of the batches: evaluation, which uses them, will be worse "
    "than training. Batches that follow one another are alike (shuffle more), the network "
    "changes faster than the average follows (a smaller decay or learning rate), or several "
    "sources share the layer. python -m bn_tf1 recalibrate gives a checkpoint the "
    "statistics of the data.",
}


def _reading(layer: MeasuredLayer, batch: Any, moving: Any) -> StatisticsReading:
    mean, variance = (np.float64(value).reshape(-1) for value in moving)
    # Without any epsilon a variance of 0 would divide by 0.
    epsilon = max(layer.epsilon, 1e-12)
    # A moving variance that is negative, the matter of the doctor, counts as 0.
    moving_square = np.maximum(variance, 0) + epsilon
    distance = (batch.statistics.mean - mean) ** 2 / moving_square
    ratio = (batch.statistics.variance + epsilon) / moving_square
    return StatisticsReading(
        layer.name,
        float(np.sqrt(np.mean(distance))),
        float(np.mean(np.abs(np.log(ratio)))),
    )


def _residual(layer, step):
    """The share of the initial value that is left; 0 where the decay is not known."""
    return 0.0 if layer.decay is None else layer.decay**step


def _summary(readings):
    summary = tf.Summary()
    for layer, *distances in readings:
        for name, value in zip(StatisticsReading._fields[1:], distances):
            summary.value.add(tag=f"batch_norm/{layer}/{name}", simple_value=value)
    return summary


def _flat(fetches):
    if isinstance(fetches, dict):
        fetches = list(fetches.values())
    if isinstance(fetches, (list, tuple)):
        return [leaf for part in fetches for leaf in _flat(part)]
    return [fetches]


def _elements(graph, names_or_elements):
    """Operations and tensors of `graph`; what else can be fetched, by its parts."""
    found = []
    for element in names_or_elements:
        if isinstance(element, tf.SparseTensor):
            found += [element.indices, element.values, element.dense_shape]
        elif isinstance(element, tf.IndexedSlices):
            found += [element.values, element.indices]
        elif element is not None:
            # What else a session can fetch tells less of what it runs: fewer probes.
            with contextlib.suppress(TypeError):
                found.append(graph.as_graph_element(element))
    return found


def _adds_little(operations):
    """Whether to run `operations`, too, costs next to nothing and needs no feed."""
    return len(operations) <= _MOST_ADDED and not any(
        op.type in _PLACEHOLDERS or op.op_def.is_stateful for op in operations
    )
