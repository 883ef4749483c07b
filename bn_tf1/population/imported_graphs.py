"""Recalibration of somebody's graph: a .meta file, a checkpoint of it, and examples.

On protocol buffers, as for an export, the graph is set to inference, and dropout is taken
out. Then every normalisation is given the mean and the variance of what it normalises,
which can be fed: in one pass they are those of the batch, behind final statistics those of
the population. Only what computes them is imported and run.

A layer without moving statistics gets them, as variables beside its gamma and beta.

Contract: the source is only read, and the result written when all is measured.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import STATISTICS, join
from bn_tf1.checkpoints.reader_writer import (
    first_line,
    open_checkpoint,
    read_meta_graph,
)
from bn_tf1.graphs.layer_analysis import analyse
from bn_tf1.graphs.node_values import VARIABLES, variable_name
from bn_tf1.graphs.recognition.batch_statistics import is_weighted
from bn_tf1.graphs.rewriting.compiled_operations import replace_compiled
from bn_tf1.graphs.rewriting.dropout_removal import remove_dropout
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, input_for, node_name
from bn_tf1.graphs.rewriting.extraction import clean_attributes, drop_controls, extract
from bn_tf1.graphs.rewriting.freezing import freeze
from bn_tf1.graphs.rewriting.function_inlining import operation_definitions
from bn_tf1.graphs.rewriting.inference_mode import set_inference_mode
from bn_tf1.graphs.rewriting.moving_statistics import Statistics as Given
from bn_tf1.graphs.rewriting.moving_statistics import normalise_with
from bn_tf1.graphs.training_nodes import Conditions
from bn_tf1.graphs.view import node_of
from bn_tf1.population.measured_layers import (
    WEIGHTED,
    MeasuredCall,
    MeasuredLayer,
    banks_of,
    channel_axis,
    in_loop,
    layer_names,
)
from bn_tf1.population.measuring_passes import Passes, in_order, unwatched
from bn_tf1.population.pooling import PooledStatistics
from bn_tf1.population.probes import of_statistics
from bn_tf1.population.recalibrated_checkpoints import (
    check_free,
    sources_of,
    write_recalibrated,
)
from bn_tf1.population.recalibration import Recalibration, compared, reached

# Larger batches are nearer to the population, until they do not fit into memory.
_MOST_EXAMPLES = 1024
_MOST_BYTES = 1 << 26
_FEWEST_EXAMPLES = 32
_BOOLS = {"1": True, "true": True, "0": False, "false": False}


class FedExamples(NamedTuple):
    """What is fed: `arrays` in batches along their first axes, `settings` always.

    Attributes:
        arrays: by name of a tensor, whose `:0` may be left out.
        settings: values, or their text, by name of a placeholder or constant.
        num_examples: how many of them to use; None for all.
        batch_size: examples in a batch; None for as many as are good.
    """

    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any] = {}
    num_examples: int | None = None
    batch_size: int | None = None

    def count(self) -> int:
        """The number of examples that are used.

        Raises:
            ValueError: there are none, or the arrays do not tell how many.
        """
        sizes = {name: len(array) for name, array in self.arrays.items()}
        count, *others = set(sizes.values()) or [None]
        problem = None
        if not sizes:
            problem = "have no array, along whose first axis they lie"
        elif others:
            problem = f"have first axes of {sizes}, but need one and the same"
        elif count == 0:
            problem = "are none: their first axis is 0"
        if problem is not None:
            raise ValueError(f"the examples {problem}")
        return min(count, self.num_examples or count)


class _Place(NamedTuple):
    """A call of a layer in the graph, by names of tensors.

    Attributes:
        measured: the mean, the variance and the number of values of what it normalises.
        given: the mean and the variance that it takes, which can be fed.
        obstacle: why it has none of them; "" where it has.
    """

    measured: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    obstacle: str = ""


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
    check_free(destination)
    source = open_checkpoint(checkpoint)
    # Those of an .npz without a first axis, such as keep_prob, are the same in each batch.
    scalars = {n: array for n, array in examples.arrays.items() if not np.ndim(array)}
    examples = examples._replace(
        arrays={n: array for n, array in examples.arrays.items() if np.ndim(array)},
        settings={**scalars, **examples.settings},
    )
    network = _Network(graph, source, ema, examples)
    try:
        report = network.recalibrated(exact, watch)
    # Somebody's graph may fail in a hundred ways: in one line, with the file's name.
    except tf.errors.OpError as error:
        raise ValueError(f"{graph} cannot be run: {first_line(error)}") from error
    write_recalibrated(destination, source, report.values(), graph=graph, ema=ema)
    return report, tuple(n for n in report.values() if n not in source.shapes)


class _Network:
    """The graph in a .meta file, whose normalisations take what they are given."""

    # On protocol buffers: 2.21 cannot import a training graph of 1.15 that has the gradient
    # of a fused kernel, nor what takes an operation of another library.

    def __init__(self, path, checkpoint, ema, examples):
        self._path = path
        self._checkpoint = checkpoint
        self._sources = sources_of(checkpoint, ema=ema)
        self._examples = examples
        meta = read_meta_graph(path)
        # Who recalibrates need not have built the operation that it was trained with.
        replace_compiled(meta)
        graph = EditableGraph(meta.graph_def)
        self._check_names(graph)
        # In inference mode the graph shows nothing of it any more.
        self._weighted = _weighted(graph.view())
        settings = {
            node_name(name): self._setting(graph, name, value)
            for name, value in examples.settings.items()
        }
        mode = set_inference_mode(graph, settings, operation_definitions(meta))
        if not mode.layers:
            raise ValueError(f"{path} has no batch-norm layer")
        self._graph, self._view = mode.graph, mode.view
        self._conditions = Conditions(self._view)
        self._layers = dict(zip(layer_names(mode.layers), mode.layers))
        self._inputs = self._imported_inputs()
        self._places = {
            name: [self._place(layer, call) for call in layer.calls]
            for name, layer in self._layers.items()
        }

    def recalibrated(self, exact, watch):
        """Measures, and writes nothing."""
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(self._graph_def(), name="")
        batches = self._batches(graph)
        layers, skipped = reached(self._measured(graph), list(batches[0]))
        if not layers:
            reasons = "; ".join(f"layer {n!r}: {why}" for n, why in skipped.items())
            raise ValueError(
                f"no layer of {self._path} can be measured: {reasons} (give inputs in the "
                "examples or, if they are always the same, with --set)"
            )
        layers = in_order(layers)
        config = tf.ConfigProto(device_count={"GPU": 0})
        with tf.Session(graph=graph, config=config) as session:
            give = self._giving(graph, layers)
            passes = Passes(session, batches, watch=watch)
            found = passes.measured(layers, give, exact=exact)
        rows = []
        for layer, row in zip(layers, found):
            variables, before = self._variables(layer.name), self._before(layer.name)
            rows.append(compared(layer, variables, before, *row))
        return Recalibration(tuple(rows), skipped)

    def _check_names(self, graph):
        for name in (*self._examples.arrays, *self._examples.settings):
            if node_name(name) not in graph.nodes:
                inputs = [n for n, v in graph.nodes.items() if "Placeholder" in v.op]
                raise ValueError(
                    f"{name!r} is no tensor of {self._path}: its inputs are "
                    f"{', '.join(inputs) or 'none'}"
                )

    def _setting(self, graph, name, value):
        """The value of a setting, which may be text, as its node takes it."""
        node = graph.nodes[node_name(name)]
        if "Placeholder" not in node.op and node.op != "Const":
            raise ValueError(f"{name} is set, but is a {node.op}, and no placeholder")
        dtype = tf.as_dtype(node.attr["dtype"].type)
        try:
            # To NumPy any text but "" is True.
            if isinstance(value, str) and dtype == tf.bool:
                return np.bool_(_BOOLS[value.lower()])
            return dtype.as_numpy_dtype(value)
        except (KeyError, ValueError):
            what = f"{name} is set to {value!r}, but is a {dtype.name}"
            raise ValueError(what) from None

    def _batches(self, graph):
        arrays = {}
        # A dataset file has labels, too, which inference does not take.
        for name, array in self._examples.arrays.items():
            if node_name(name) in self._graph.nodes:  # others are not needed
                tensor = graph.get_tensor_by_name(_tensor(name))
                if not tensor.shape.is_compatible_with((None, *np.shape(array)[1:])):
                    raise ValueError(
                        f"the examples have {name!r} of shape {list(np.shape(array))}, "
                        f"but in {self._path} it is {tensor.shape}"
                    )
                arrays[tensor] = array
        count = self._examples.count()
        size = _batch_size(arrays, count, self._examples)
        # The last may be smaller; they are views, which copy nothing.
        return [
            {t: array[start : min(start + size, count)] for t, array in arrays.items()}
            for start in range(0, count, size)
        ]

    def _place(self, layer, call):
        """Lets `call` take statistics that can be fed, and measures what it normalises."""
        view, graph = self._view, self._graph
        banks = banks_of(view, layer)
        if banks:
            what = "say which with --set, as the graph calls it"
            return _Place(obstacle=f"it takes one of {banks}: {what}")
        if _key(layer) in self._weighted:
            return _Place(obstacle=WEIGHTED)
        if in_loop(view, self._conditions, call.node):
            return _Place(obstacle="it is inside of a loop")
        found = self._whole_input(layer, call)
        # A body can be called from several places: its values are not those of one layer.
        if found is None:
            what = "what it normalises is in a function, or its channels are not known"
            return _Place(obstacle=what)
        x, axis, repeats = found
        scope = f"{view.names[call.node]}/population"
        measured = _moments(graph, scope, x, self._inputs[x], axis)
        # What is fed is optional: unfed, a layer takes the batch's, as in training.
        how = {"dtype": tf.float32, "shape": None}
        given = [
            graph.add("PlaceholderWithDefault", f"{scope}/{role}", [source], **how)
            for role, source in zip(STATISTICS, measured)
        ]
        taken = given
        if repeats > 1:
            times = graph.constant(f"{scope}/times", np.array([repeats], np.int32))
            taken = [
                graph.add("Tile", f"{name}/tiled", [name, times], T=tf.float32)
                for name in given
            ]
        try:
            normalise_with(graph, view, call, Given(*taken))
        except ValueError as error:
            return _Place(obstacle=str(error))
        return _Place(measured, tuple(given))

    def _whole_input(self, layer, call):
        """(what `call` normalises, its channel axis, how often they follow each other).

        `bn_tf1` sees several pixels in a row as more channels; before that, they are one
        pixel each.
        """
        channels = layer.layer.channels
        wide = seen = None
        for name in self._ways_in(call):
            x = self._inputs.get(name)
            if x is None or x.shape.ndims is None:
                break
            sizes = x.shape.as_list()
            seen = seen or sizes
            # An Identity before the kernel changes nothing of what it sees.
            axis = channel_axis(sizes, call.axes if sizes == seen else None, channels)
            if axis is None:
                break
            wide = wide or sizes[axis]
            if channels in (None, sizes[axis]):
                return name, axis, 1 if channels is None else wide // channels
        return None

    def _ways_in(self, call):
        """What `call` normalises, and of what that is another shape."""
        reference = call.x
        for _ in range(6):  # a view and its Identity, and those of a user's own
            node = node_of(reference)
            yield input_for(self._view, reference)
            if self._view.ops[node] not in ("Reshape", "Identity"):
                return
            reference = self._view.inputs[node][0]

    def _imported_inputs(self):
        """By what they are called, what the layers normalise, for its shape and dtype."""
        # In a session's graph, whose shape functions know more than the file states.
        view, graph = self._view, self._graph.copy()
        calls = [call for layer in self._layers.values() for call in layer.calls]
        outside = [call for call in calls if not view.body_of(node_of(call.x))]
        names = {name for call in outside for name in self._ways_in(call)}
        wanted = sorted({node_name(name) for name in names})
        drop_controls(graph, wanted)
        extract(graph, wanted)
        clean_attributes(graph)
        with tf.Graph().as_default() as scratch:
            tf.import_graph_def(graph.graph_def(), name="")
        return {name: scratch.get_tensor_by_name(_tensor(name)) for name in names}

    def _graph_def(self):
        graph = self._graph
        places = [place for places in self._places.values() for place in places]
        wanted = [name for p in places for name in (*p.measured, *p.given)]
        # Updates that are waited for would assign to what is a constant when it is frozen.
        drop_controls(graph, wanted)
        # Statistics behind dropout are not those that inference meets.
        remove_dropout(graph, [node_name(name) for name in self._examples.arrays])
        extract(graph, wanted)
        freeze(graph, self._value)
        clean_attributes(graph)
        return graph.graph_def()

    def _value(self, name):
        if name in self._sources:
            return self._checkpoint.read(self._sources[name])
        if any(name in n for layer in self._layers for n in self._variables(layer)):
            # A statistic that was never saved, and is not needed.
            shape = self._view.attribute(self._view.find(name), "shape").shape
            return np.zeros([size.size for size in shape.dim], np.float32)
        raise ValueError(f"{self._checkpoint.prefix} lacks {name} of {self._path}")

    def _measured(self, graph):
        """The layers, by those calls that are in inference mode where there are some."""
        layers = []
        for name, layer in self._layers.items():
            both = list(zip(layer.calls, self._places[name]))
            of_inference = [pair for pair in both if pair[0].mode == "inference"]
            calls = [self._call(graph, place) for _, place in of_inference or both]
            epsilon = layer.layer.epsilon or 0.0
            layers.append(MeasuredLayer(name, None, tuple(calls), epsilon))
        return layers

    def _call(self, graph, place):
        if place.obstacle:
            return MeasuredCall(None, None, place.obstacle)
        *statistics, size = map(graph.get_tensor_by_name, map(_tensor, place.measured))
        probe = of_statistics(*statistics, size=size)
        return MeasuredCall(probe, lambda: probe)

    def _giving(self, graph, layers):
        """Gives statistics to all calls of layers, by feeding them."""

        def give(statistics):
            return {
                graph.get_tensor_by_name(_tensor(name)): values
                for layer, given in zip(layers, statistics)
                for place in self._places[layer.name]
                for name, values in zip(place.given, given)
            }

        return give

    def _variables(self, name):
        """The names of its moving means and variances, made up where it has none."""
        layer, view, names = self._layers[name], self._view, []
        for role in STATISTICS:
            nodes = [n for n in layer.variables[role] if view.ops[n] in VARIABLES]
            own = sorted({variable_name(view, node) for node in nodes})
            # One of its usual name, for whoever builds the layer with statistics later.
            names.append(tuple(own) or (join(layer.layer.name, role),))
        return tuple(names)

    def _before(self, name):
        """Its statistics in the checkpoint; None where it has none there."""
        names = [names[0] for names in self._variables(name)]
        if not all(name in self._checkpoint.shapes for name in names):
            return None
        return PooledStatistics.of(*map(self._checkpoint.read, names))


def _tensor(name):
    return name if ":" in name else f"{name}:0"


def _weighted(view):
    """The layers of which a mask, or other weights, say which values count."""
    return {
        _key(layer)
        for layer in analyse(view, Conditions(view))
        if any(is_weighted(view, call.mean) for call in layer.calls)
    }


def _key(layer):
    return layer.layer.moving_mean or layer.layer.name


def _moments(graph, name, x, tensor, axis):
    """The names of the mean, the biased variance and the number of values of `x`.

    `tensor` tells its shape and dtype.
    """
    dtype = tensor.dtype.base_dtype
    if dtype not in (tf.float32, tf.float64):
        x = graph.add("Cast", f"{name}/x", [x], SrcT=dtype, DstT=tf.float32)
        dtype = tf.float32
    axes = [a for a in range(tensor.shape.ndims) if a != axis]
    axes = graph.constant(f"{name}/axes", np.array(axes, np.int32))

    # In two passes, of the mean first: E[x^2] - E[x]^2 cancels where a mean is large.
    def mean(of, leaf, keep):
        options = {"T": dtype, "Tidx": tf.int32, "keep_dims": keep}
        return graph.add("Mean", f"{name}/{leaf}", [of, axes], **options)

    kept = mean(x, "kept_mean", True)
    squares = graph.add("SquaredDifference", f"{name}/squares", [x, kept], T=dtype)
    size = graph.add("Size", f"{name}/size", [x], T=dtype, out_type=tf.int64)
    return mean(x, "mean", False), mean(squares, "variance", False), size


def _batch_size(arrays, count, examples):
    """How many examples are fed at once."""
    fixed = {tf.dimension_value(tensor.shape[0]) for tensor in arrays} - {None}
    if len(fixed) > 1:
        raise ValueError(f"the inputs of the graph have batches of {sorted(fixed)}")
    # Reshapes in a graph that was built for one size of batch hold for no other.
    if fixed:
        (size,) = fixed
        if count < size:
            raise ValueError(f"the graph takes {size} examples at once: give as many")
        # An example that filled up the last batch would count twice.
        if count % size:
            raise ValueError(
                f"the graph takes {size} examples at once, and {count} is no multiple of "
                f"{size}: give {count - count % size}"
            )
        return size
    if examples.batch_size is not None:
        return examples.batch_size
    size = sum(array[:1].nbytes for array in arrays.values())
    return min(_MOST_EXAMPLES, max(_FEWEST_EXAMPLES, _MOST_BYTES // max(size, 1)))
