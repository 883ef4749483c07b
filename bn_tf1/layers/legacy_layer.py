"""What a layer of `tf.layers` is to its users, for layers of this library.

Contract: the scopes, the names, the numbering, the reuse, the collections and the
attributes that TensorFlow 1.15 documents for `tf.layers.Layer`, without Keras:

    built with               its variables are under
    name="bn"                bn, in the variable scope of the constructor
    no name                  batch_normalization, batch_normalization_1, ..., in the
                             variable scope of the first call; numbered with all
                             other scopes of that name
    a variable scope         that scope

A subclass has `build(input_shape)`, which adds weights and sets `built`, and
`call(inputs, ...)`.

Source: the documentation of `tf.layers`, TensorFlow 1.15.
"""

from __future__ import annotations

import collections
import contextlib
import re
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import names_here
from bn_tf1.control_flow import ancestors
from bn_tf1.drop_in import add_to_collection, as_list, parts

# A tuple, so that `export_meta_graph` does not try to write it (see `built_layers`).
_NAME_COUNTS_KEY = ("bn_tf1_layer_name_counts",)


class InputSpec(NamedTuple):
    """What a built layer takes: the rank, and the known size of some axes."""

    ndim: int
    axes: dict


class _Call(NamedTuple):
    """One call of a layer."""

    input: tf.Tensor
    output: tf.Tensor


class LegacyLayer:
    """A layer with variables under a scope of its own, shared by all its calls.

    Attributes:
        built: whether the variables exist.
        dtype: the name of the dtype of the first input, or what the constructor was
            given; None before.
        input_spec: an `InputSpec` once it is built; every input must comply.
        trainable: whether its variables are trainable; may be set later.
    """

    def __init__(
        self,
        trainable: Any = True,
        name: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        scope = kwargs.pop("_scope", None)
        self._reuse = kwargs.pop("_reuse", None)
        # What is left is known to neither this class nor the subclass.
        for unknown in kwargs:
            here = names_here(type(self).__init__).get(unknown)
            hint = f": here it is `{here}`" if here else ""
            raise TypeError(f"{type(self).__name__} has no argument `{unknown}`{hint}")
        self.trainable = trainable
        self.built = False
        self.input_spec = None
        self._dtype = None if dtype is None else tf.as_dtype(dtype)
        self._base_name, self._name = _names(type(self), name)
        # Kept apart from the variables' own flags: `trainable` may be set later, for all.
        self._trainable_weights = []
        self._non_trainable_weights = []
        self._updates = []
        self._losses = []
        self._calls = []
        self._scope = None
        # A name is a scope below the one of the constructor, wherever the first call is.
        if scope:
            with tf.variable_scope(scope) as captured:
                self._scope = captured

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
        """Builds the layer if it is not, and applies it to `inputs`.

        Args:
            inputs: a tensor, or what converts to one.
            *args: for `call`.
            **kwargs: for `call`, but `scope`: the variable scope of a layer without a
                name, at its first call.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                f"the layer {self.name!r} builds graphs, but eager execution is on: "
                "call tf.disable_eager_execution() at the start of the program"
            )
        inputs = tf.convert_to_tensor(inputs)
        self._set_scope(kwargs.pop("scope", None))
        with self._entered():
            # Its first inputs say what was not said: their dtype, and the number of channels.
            if not self.built:
                self._dtype = self._dtype or inputs.dtype.base_dtype
                self.build(inputs.shape)
            self._check_input(inputs)
            outputs = self.call(inputs, *args, **kwargs)
        self._calls.append(_Call(inputs, outputs))
        # Of all calls so far, each of them once, as the original does after every call.
        add_to_collection(tf.GraphKeys.UPDATE_OPS, self.updates)
        return outputs

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
        """The same as calling the layer."""
        return self(inputs, *args, **kwargs)

    def _set_scope(self, scope):
        if self._scope is not None:
            return
        # A default name is made unique, and so never that of the variables to reuse.
        if scope is None and self._reuse:
            scope = self._base_name
        with tf.variable_scope(scope, default_name=self._base_name) as captured:
            self._scope = captured

    @contextlib.contextmanager
    def _entered(self):
        # A second call shares what the first has made, whatever the caller's scope says.
        reuse = True if self.built else self._reuse
        # The variables' scope is the layer's for good, and so is that of its operations:
        # without the auxiliary scope, a second call does not make up another one.
        with tf.variable_scope(
            self._scope, reuse=reuse, auxiliary_name_scope=False
        ) as scope, tf.name_scope(scope.original_name_scope):
            yield

    def _check_input(self, inputs):
        spec, shape = self.input_spec, inputs.shape
        if spec is None:
            return
        # A size that is not known may fit: then a run tells.
        sizes = spec.axes.items()
        if shape.ndims != spec.ndim or any(
            tf.dimension_value(shape[axis]) not in (size, None) for axis, size in sizes
        ):
            raise ValueError(
                f"`inputs` has shape {shape}, which is incompatible with the layer "
                f"{self.name!r}: it was built for rank {spec.ndim} and sizes {spec.axes} "
                "by axis"
            )

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Callable | None = None,
        trainable: bool = True,
        constraint: Callable | None = None,
        **options: Any,
    ) -> Any:
        """Creates a variable of the layer, or gets it under reuse.

        Args:
            name: its name under the layer's scope.
            shape, dtype, initializer, constraint: as for `tf.get_variable`.
            regularizer: a function of the variable; what it returns goes to
                `REGULARIZATION_LOSSES` when the variable is new.
            trainable: whether the variable is trainable, if the layer is.
            **options: for `tf.get_variable`.
        """
        # `build` may be called by itself, before any call has made the scope.
        self._set_scope(None)
        trainable = trainable and self.trainable is not False
        # Who shares a variable has its regularisation in the loss already.
        existing = set()
        if regularizer is not None:
            existing = {id(variable) for variable in tf.global_variables()}
        with self._entered():
            variable = tf.get_variable(
                name,
                shape,
                dtype or self._dtype or tf.float32,
                initializer,
                trainable=trainable,
                constraint=constraint,
                **options,
            )
            # An optimizer, and so its collections, know of parts alone.
            made = parts(variable)
            if regularizer is not None and not any(id(v) in existing for v in made):
                for part in made:
                    with tf.name_scope(name + "/Regularizer"):
                        loss = regularizer(part)
                    if loss is not None:
                        self.add_loss(loss)
        for part in made:
            # A custom getter may have overridden `trainable`.
            if trainable and part.trainable:
                self._trainable_weights.append(part)
            else:
                self._non_trainable_weights.append(part)
        return variable

    add_variable = add_weight

    def add_update(self, updates: Any, inputs: Any = None) -> None:
        """Adds update operations to `updates`; a call brings them to `UPDATE_OPS`."""
        del inputs  # `get_updates_for` sees it in the graph.
        # A function, as Keras's layers give it, makes the operation when it is called.
        for update in as_list(updates):
            update = update() if callable(update) else update
            self._updates.append(getattr(update, "op", update))

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """Adds loss tensors to `losses` and to `REGULARIZATION_LOSSES`."""
        del inputs
        self._losses += as_list(losses)
        add_to_collection(tf.GraphKeys.REGULARIZATION_LOSSES, as_list(losses))

    @property
    def trainable_weights(self) -> list:
        # Of a layer that is frozen later, as well: the graph's collection keeps what it has.
        return [] if self.trainable is False else list(self._trainable_weights)

    @property
    def non_trainable_weights(self) -> list:
        if self.trainable is False:
            return self._trainable_weights + self._non_trainable_weights
        return list(self._non_trainable_weights)

    @property
    def weights(self) -> list:
        return self.trainable_weights + self.non_trainable_weights

    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights
    variables = weights

    @property
    def updates(self) -> list:
        """The update operations of all calls; none of a layer that is not trainable."""
        return [] if self.trainable is False else list(self._updates)

    @property
    def losses(self) -> list:
        return list(self._losses)

    def get_updates_for(self, inputs: Any) -> list:
        """The updates that depend on `inputs`; for None, those on no input at all."""
        return self._of(inputs, self.updates)

    def get_losses_for(self, inputs: Any) -> list:
        """The losses that depend on `inputs`; for None, those on no input at all."""
        return self._of(inputs, self.losses)

    def _of(self, inputs, elements):
        given = [call.input for call in self._calls] if inputs is None else inputs
        sources = {tensor.op for tensor in as_list(given)}
        found = []
        # Without inputs: what depends on none, such as the regularisation of a variable.
        for element in elements:
            depends = sources & ancestors([getattr(element, "op", element)])
            if bool(depends) == (inputs is not None):
                found.append(element)
        return found

    def count_params(self) -> int:
        """The number of values in all variables."""
        if not self.built:
            raise ValueError(
                f"the layer {self.name!r} has no variables to count: call it or build "
                "it first"
            )
        return sum(int(np.prod(v.shape.as_list())) for v in self.weights)

    @property
    def name(self) -> str:
        return self._name

    @property
    def scope_name(self) -> str:
        """The variable scope, known from the first call on."""
        if self._scope is None:
            raise ValueError(
                f"the layer {self.name!r} has no scope yet: its first call makes it"
            )
        return self._scope.name

    @property
    def dtype(self) -> str | None:
        return None if self._dtype is None else self._dtype.name

    @property
    def graph(self) -> None:
        """None, as in TensorFlow 1.15, whose layers do not track their graph."""
        return None

    @property
    def input(self) -> tf.Tensor:
        return self._only_call("input").input

    @property
    def output(self) -> tf.Tensor:
        return self._only_call("output").output

    @property
    def input_shape(self) -> tuple:
        return tuple(self._only_call("input_shape").input.shape.as_list())

    @property
    def output_shape(self) -> tuple:
        return tuple(self._only_call("output_shape").output.shape.as_list())

    def get_input_at(self, node_index: int) -> tf.Tensor:
        """The input of one of the calls, which count from 0."""
        return self._calls[node_index].input

    def get_output_at(self, node_index: int) -> tf.Tensor:
        """The output of one of the calls, which count from 0."""
        return self._calls[node_index].output

    def _only_call(self, attribute):
        if len(self._calls) != 1:
            raise AttributeError(
                f"the layer {self.name!r} was called {len(self._calls)} times, so that "
                f"`{attribute}` is not one; see `get_input_at` and `get_output_at`"
            )
        return self._calls[0]


def _names(layer_class, name):
    """The name of the scope, and that of the layer.

    A name of its own is one ahead of the scope's: the original counts from 1.
    """
    if name and not isinstance(name, tf.VariableScope):
        return name, name
    base = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", layer_class.__name__).lower()
    # In the graph, so that each graph begins to count anew, as the original's names do.
    counts = tf.get_collection_ref(_NAME_COUNTS_KEY)
    if not counts:
        counts.append(collections.Counter())
    counts[0][base] += 1
    unique = f"{base}_{counts[0][base]}"
    return (name.name if name else base), unique
