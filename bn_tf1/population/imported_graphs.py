"""Recalibration of somebody's graph: a .meta file, a checkpoint of it, and examples.

    1  the graph is read and its layers are recognised; nothing is imported yet
    2  what computes their statistics is imported, and nothing else: no optimizer, no
       loss; devices and stored shapes are left out, so that a graph of 1.15 runs on
       every TensorFlow
    3  batch norm is switched to training, and nothing else (`training_mode`)
    4  a second import stands for inference, whether the graph has that mode or not: in
       it the fused kernels take given statistics, and composed layers are fed them

A layer without moving statistics gets them, as variables beside its gamma and beta.

Contract: the source is only read, and the result written when all is measured.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import STATISTICS, join
from bn_tf1.checkpoints.reader_writer import (
    check_new,
    first_line,
    open_checkpoint,
    read_meta_graph,
)
from bn_tf1.graphs.layer_analysis import analyse
from bn_tf1.graphs.node_values import VARIABLES, variable_name
from bn_tf1.graphs.training_nodes import Conditions
from bn_tf1.graphs.view import node_of, port_of, view_of
from bn_tf1.population.measured_layers import MeasuredLayer, layer_names, recognised
from bn_tf1.population.passes import Passes, unwatched
from bn_tf1.population.pooling import PooledStatistics
from bn_tf1.population.recalibrated_checkpoints import sources_of, write_recalibrated
from bn_tf1.population.recalibration import (
    Recalibration,
    compared,
    only_fed,
    reached,
)
from bn_tf1.population.training_mode import training_mode

# Larger batches are nearer to the population, until they do not fit into memory.
_MOST_EXAMPLES = 1024
_MOST_BYTES = 1 << 26
_FEWEST_EXAMPLES = 32


class FedExamples(NamedTuple):
    """What is fed: `arrays` in batches along their first axes, `settings` always.

    Attributes:
        arrays, settings: by name of a tensor, whose `:0` may be left out.
        num_examples: how many of them to use; None for all.
        batch_size: examples in a batch; None for as many as are good.
    """

    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any] = {}
    num_examples: int | None = None
    batch_size: int | None = None


class _Batches(NamedTuple):
    """The feeds of a graph, as often as one iterates over them."""

    arrays: Mapping[tf.Tensor, np.ndarray]
    settings: Mapping[tf.Tensor, Any]
    size: int
    count: int

    def fed(self) -> list[tf.Tensor]:
        """The tensors that every batch feeds."""
        return [*self.arrays, *self.settings]

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, self.count, self.size):
            end = min(start + self.size, self.count)
            batch = {tensor: a[start:end] for tensor, a in self.arrays.items()}
            yield {**batch, **self.settings}


def recalibrate_graph(
    graph: str,
    destination: str,
    *,
    checkpoint: str,
    examples: FedExamples,
    ema: bool = False,
    exact: bool = False,
    watch: Callable = unwatched,
) -> tuple[Recalibration, tuple[str, ...]]:
    """Writes `checkpoint` with statistics that are those of its weights on `examples`.

    Args:
        graph: a .meta file of any library.
        destination: prefix of the checkpoint to write; nothing may be there.
        checkpoint: prefix or directory of the checkpoint of `graph`.
        examples: the inputs.
        ema: whether weight averages become the weights first.
        exact, watch: as for `recalibrate`.

    Returns:
        (the report, the names of variables that `checkpoint` did not have).

    Raises:
        ValueError: a file cannot be read, an input is unknown or missing, a layer has
            statistics that are not finite, or there is none.
    """
    check_new(destination)
    source = open_checkpoint(checkpoint)
    foreign = _Foreign(graph, source, ema)
    try:
        report = foreign.recalibrated(examples, exact, watch)
    except tf.errors.OpError as error:
        raise ValueError(f"{graph} cannot be run: {first_line(error)}") from error
    write_recalibrated(destination, source, report.values(), ema=ema)
    return report, tuple(n for n in report.values() if n not in source.shapes)


class _Foreign:
    """The graph in a .meta file, and its checkpoint."""

    def __init__(self, path, checkpoint, ema):
        self._path = path
        self._checkpoint = checkpoint
        self._sources = sources_of(checkpoint, ema=ema)
        self._graph_def = read_meta_graph(path).graph_def
        self._view = view_of(self._graph_def)
        self._conditions = Conditions(self._view)
        self._found = analyse(self._view, self._conditions)
        if not self._found:
            raise ValueError(f"{path} has no batch-norm layer")
        self._layers = dict(zip(layer_names(self._found), self._found))
        self._mode = training_mode(self._view, self._conditions, self._found)

    def recalibrated(self, examples, exact, watch):
        """Measures, and writes nothing."""
        measured, skipped = self._in_training(examples, watch)
        if exact:
            skipped = {n: why for n, why in skipped.items() if n not in self._layers}
        if not measured and not exact:
            reasons = "; ".join(f"layer {n!r}: {why}" for n, why in skipped.items())
            raise ValueError(
                f"no layer of {self._path} can be measured: {reasons} (give inputs in the "
                "examples or, if they are always the same, with --set)"
            )
        measured = self._in_inference(measured, examples, exact, watch)
        rows = []
        for name, (after, count, mismatch) in measured.items():
            found = self._layers[name]
            after = PooledStatistics(
                *(np.float64(np.float32(values)) for values in after)
            )
            rows.append(
                compared(
                    name,
                    self._variables(found),
                    found.layer.epsilon or 0.0,
                    self._before(found),
                    after,
                    count,
                    mismatch,
                )
            )
        return Recalibration(tuple(rows), skipped)

    def _in_training(self, examples, watch):
        """(what was measured, by layer; by layer or call why it was not)."""
        with self._imported(None) as network:
            batches = self._batches(network.graph, examples)
            layers, skipped = reached(network.layers, batches.fed())
            passes = Passes(network.session, batches, watch=watch)
            pools = passes.in_one_pass(layers) if layers else []
        return {
            layer.name: (pool.statistics, pool.count, None)
            for layer, pool in zip(layers, pools)
        }, skipped

    def _in_inference(self, measured, examples, exact, watch):
        """`measured` with the mismatches; anew, layer by layer, if `exact`."""
        names = list(self._layers) if exact else list(measured)
        given = _Given(self._view, {name: self._layers[name] for name in names})
        with self._imported(given) as network:
            batches = self._batches(network.graph, examples)
            passes = Passes(network.session, batches, watch=watch)
            layers = [layer for layer in network.layers if layer.name in names]
            fed = batches.fed() + given.placeholders(network.graph)
            layers = [only_fed(layer, fed) for layer in layers]
            if exact:
                layers = [layer for layer in layers if layer.calls]
            if not (layers and all(layer.calls for layer in layers)):
                return measured  # what they normalise cannot be fetched

            def give(statistics):
                return given.fed(network.graph, layers, statistics)

            final = [
                measured[layer.name][0]
                if layer.name in measured
                else self._before(self._layers[layer.name])
                for layer in layers
            ]
            counts = [measured[layer.name][1] for layer in layers if not exact]
            if exact:
                pools = passes.behind_final_statistics(layers, final, give)
                final = [pool.statistics for pool in pools]
                counts = [pool.count for pool in pools]
            mismatches = passes.mismatches(layers, final, give)
        return {
            layer.name: row
            for layer, row in zip(layers, zip(final, counts, mismatches))
        }

    def _before(self, found):
        """Its statistics in the checkpoint; None where it has none there."""
        names = [names[0] for names in self._variables(found)]
        if not all(name in self._checkpoint.shapes for name in names):
            return None
        values = [np.float64(self._checkpoint.read(name)) for name in names]
        return PooledStatistics(*(value.reshape(-1) for value in values))

    def _variables(self, found):
        """The names of its moving means and variances, made up where it has none."""
        names = []
        for role in STATISTICS:
            nodes = [n for n in found.variables[role] if self._view.ops[n] in VARIABLES]
            own = sorted({variable_name(self._view, node) for node in nodes})
            names.append(tuple(own) or (join(found.layer.name, role),))
        return tuple(names)

    # ------------------------------------------------------------------ what is imported

    @contextlib.contextmanager
    def _imported(self, given):
        graph_def = self._subgraph()
        if given is not None:
            given.rewrite(graph_def)
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graph_def, name="")
            layers = recognised(
                self._view, self._conditions, self._found, graph, moving=False
            )
            restore = self._restoring(graph)
            config = tf.ConfigProto(device_count={"GPU": 0})
            with tf.Session(config=config) as session:
                session.run(restore)
                yield _Network(graph, session, layers)

    def _subgraph(self):
        """What computes the layers, without what ties it to a machine or a version."""
        view, wanted = self._view, set()
        for layer in self._found:
            for call in layer.calls:
                node = call.node
                while view.body_of(node):
                    node = view.callers[view.body_of(node)][0]
                wanted.add(view.names[node])
        graph_def = tf.graph_util.extract_sub_graph(self._graph_def, sorted(wanted))
        functions = [f.node_def for f in graph_def.library.function]
        pivots = {view.names[n]: self._name(p) for n, p in self._mode.pivots.items()}
        for node in graph_def.node:
            if node.name in pivots:
                node.input[0] = node.input[1] = pivots[node.name]
        for nodes in (graph_def.node, *functions):
            for node in nodes:
                node.device = ""
                for attribute in ("_class", "_output_shapes"):
                    if attribute in node.attr:
                        del node.attr[attribute]
        return graph_def

    def _restoring(self, graph):
        """Operations that give the variables of `graph` their values."""
        variables = [op for op in graph.get_operations() if op.type in VARIABLES]
        moving = {n for f in self._found for names in self._variables(f) for n in names}
        missing = [
            op.name
            for op in variables
            if op.name not in self._sources and op.name not in moving
        ]
        if missing:
            raise ValueError(
                f"{self._checkpoint.prefix} lacks {', '.join(missing)} of {self._path}"
            )
        return [self._restored(op) for op in variables]

    def _restored(self, op):
        dtype = op.get_attr("dtype")
        if op.name in self._sources:
            (value,) = tf.raw_ops.RestoreV2(
                prefix=self._checkpoint.prefix,
                tensor_names=[self._sources[op.name]],
                shape_and_slices=[""],
                dtypes=[dtype],
            )
        else:  # a statistic that was never saved
            value = tf.zeros(tf.TensorShape(op.get_attr("shape")), dtype)
        if op.type == "VarHandleOp":
            return tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=value)
        return tf.raw_ops.Assign(ref=op.outputs[0], value=value).op

    # ----------------------------------------------------------------------- what is fed

    def _batches(self, graph, examples):
        arrays = self._tensors(graph, examples.arrays)
        settings = {
            tensor: _setting(tensor, value)
            for tensor, value in self._tensors(graph, examples.settings).items()
        }
        settings.update({t: a for t, a in arrays.items() if np.ndim(a) == 0})
        arrays = {t: a for t, a in arrays.items() if np.ndim(a)}
        count = self._count(examples)
        for reference, value in self._mode.origins.items():
            tensor = self._tensor(graph, reference)
            if tensor is not None and tensor.op.type == "Placeholder":
                settings.setdefault(tensor, not value)
        for reference, value in self._mode.conditions.items():
            tensor = self._tensor(graph, reference)
            if tensor is not None:
                settings[tensor] = value
        return _Batches(arrays, settings, _batch_size(arrays, count, examples), count)

    def _tensors(self, graph, values):
        """Value by tensor; those that the layers do not depend on are left out."""
        found = {}
        for name, value in values.items():
            node, _, port = name.partition(":")
            if self._view.find(node) is None:
                inputs = [
                    self._view.names[n]
                    for n, op in enumerate(self._view.ops)
                    if op.startswith("Placeholder") and not self._view.body_of(n)
                ]
                raise ValueError(
                    f"{name!r} is no tensor of {self._path}: its inputs are "
                    f"{', '.join(inputs) or 'none'}"
                )
            try:
                tensor = graph.get_tensor_by_name(f"{node}:{port or 0}")
            except KeyError:
                continue
            found[tensor] = value
        return found

    def _tensor(self, graph, reference):
        try:
            return graph.get_tensor_by_name(self._name(reference))
        except KeyError:
            return None

    def _name(self, reference):
        return f"{self._view.names[node_of(reference)]}:{port_of(reference)}"

    def _count(self, examples):
        sizes = {
            name: len(array)
            for name, array in examples.arrays.items()
            if np.ndim(array)
        }
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"the examples have first axes of {sizes}, but need one and the same"
                if sizes
                else "there are no examples: an array along whose first axis they lie"
            )
        (count,) = set(sizes.values())
        if count == 0:
            raise ValueError("the examples are none: their first axis is 0")
        return min(count, examples.num_examples or count)


class _Network(NamedTuple):
    """An import of a graph, restored."""

    graph: tf.Graph
    session: Any
    layers: list[MeasuredLayer]


class _Given:
    """PooledStatistics that are given to the layers of an import.

    A fused kernel in training mode is made one of inference with placeholders for them;
    where a layer takes statistics from elsewhere, what it takes is fed.
    """

    def __init__(self, view, found):
        self._kernels = {}  # by the name of a fused node: its placeholders
        self._places = {  # by the name of a layer: pairs of names of tensors
            name: [self._place(view, call) for call in layer.calls]
            for name, layer in found.items()
        }

    def _place(self, view, call):
        node = view.names[call.node]
        if call.kind == "fused" and call.mode == "training":
            self._kernels[node] = [f"{node}/recalibrated_{s}" for s in STATISTICS]
            return [f"{name}:0" for name in self._kernels[node]]
        references = call.mean, call.variance
        return [f"{view.names[node_of(r)]}:{port_of(r)}" for r in references]

    def rewrite(self, graph_def):
        """Makes the fused kernels take what is given."""
        for node in list(graph_def.node):
            for i, name in enumerate(self._kernels.get(node.name, ())):
                node.attr["is_training"].b = False
                node.input[3 + i] = name
                place = graph_def.node.add(name=name, op="Placeholder")
                place.attr["dtype"].type = node.attr["U"].type or tf.float32
                place.attr["shape"].shape.unknown_rank = True
                if "exponential_avg_factor" in node.attr:
                    del node.attr["exponential_avg_factor"]

    def placeholders(self, graph):
        """Those that `rewrite` made."""
        names = [name for names in self._kernels.values() for name in names]
        return [graph.get_tensor_by_name(f"{name}:0") for name in names]

    def fed(self, graph, layers, statistics):
        """The feed that gives `statistics` to `layers`."""
        feed = {}
        for layer, values in zip(layers, statistics):
            for names in self._places[layer.name]:
                for name, value in zip(names, values):
                    tensor = graph.get_tensor_by_name(name)
                    if tensor.shape.is_fully_defined():
                        value = value.reshape(tensor.shape.as_list())
                    feed[tensor] = value
        return feed


def _setting(tensor, value):
    """The value of a setting, which may be text, as `tensor` takes it."""
    if isinstance(value, str) and tensor.dtype.base_dtype == tf.bool:
        known = {"1": True, "true": True, "0": False, "false": False}
        if value.lower() not in known:
            raise ValueError(
                f"{tensor.name} is set to {value!r}, but is a bool: 0 or 1"
            )
        value = known[value.lower()]
    dtype = tensor.dtype.base_dtype.as_numpy_dtype
    try:
        return np.full(
            tensor.shape.as_list() if tensor.shape.ndims else [], value, dtype
        )
    except ValueError:
        raise ValueError(
            f"{tensor.name} is set to {value!r}, but is of {tensor.dtype.name}"
        ) from None


def _batch_size(arrays, count, examples):
    """How many examples are fed at once."""
    fixed = {tf.dimension_value(tensor.shape[0]) for tensor in arrays} - {None}
    if len(fixed) > 1:
        raise ValueError(f"the inputs of the graph have batches of {sorted(fixed)}")
    if fixed:
        (size,) = fixed
        if count < size:
            raise ValueError(f"the graph takes {size} examples at once: give as many")
        return size
    if examples.batch_size is not None:
        return examples.batch_size
    size = sum(array[:1].nbytes for array in arrays.values())
    return min(_MOST_EXAMPLES, max(_FEWEST_EXAMPLES, _MOST_BYTES // max(size, 1)))
