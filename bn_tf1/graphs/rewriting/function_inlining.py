"""Calls of functions, conditions and loops of control flow v2 as plain nodes of v1.

A call becomes the nodes of the function, an `If` the branch that its constant predicate
chooses, or both with `Switch` and `Merge`, a `While` the loop of control flow v1. What
follows then knows one form of each. It is what TensorFlow's runtime does itself before
a graph runs.

Source: tensorflow/core/common_runtime/lower_if_op.cc, lower_while_op.cc and
inline_function_utils.cc, of which this is the part that has no side effects.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    data_inputs,
    node_name,
    tensor_name,
)
from bn_tf1.graphs.view import LOOPS

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_IFS = ("If", "StatelessIf", "_If")
_CASES = ("Case", "StatelessCase")
# A function that calls itself has no end.
_MAX_INLINED = 100_000
# Outputs that have names of their own, where the file holds no definitions.
_PORTS = {
    ("FusedBatchNorm", "batch_mean"): 1,
    ("FusedBatchNorm", "batch_variance"): 2,
    ("Switch", "output_true"): 1,
    ("Merge", "value_index"): 1,
    ("TopK", "indices"): 1,
}


class InliningError(ValueError):
    """A function that cannot be made plain nodes."""


def inline_functions(
    graph: EditableGraph,
    definitions: Mapping[str, Any],
    value_of: Callable[[str], Any],
) -> None:
    """Makes plain nodes of all calls, conditions and loops of `graph`.

    Args:
        graph: is changed.
        definitions: OpDef by operation, of the file; may be empty.
        value_of: the value of a scalar where it is constant, else None: what it decides,
            as the predicate of an `If` or the index of a `Case`, becomes one function. A
            `Case` whose index is not constant stays.

    Raises:
        InliningError: a function calls itself, or is damaged.
    """
    inliner = _Inliner(graph, definitions, value_of)
    pending = list(filter(inliner.is_inlined, graph.nodes))
    for _ in range(_MAX_INLINED):
        if not pending:
            return
        # What a function calls itself is found among the nodes that it became.
        before = set(graph.nodes)
        inliner.inline(pending.pop())
        pending += [n for n in graph.nodes if n not in before and inliner.is_inlined(n)]
    raise InliningError(f"its functions are called more than {_MAX_INLINED} times")


class _Inliner:
    def __init__(self, graph, definitions, value_of):
        self._graph = graph
        self._definitions = definitions
        self._value_of = value_of

    def is_inlined(self, name):
        node = self._graph.nodes[name]
        if node.op in _CASES:
            return self._value_of(node.input[0]) is not None
        return node.op in _CALLS + _IFS + LOOPS or node.op in self._graph.functions

    def inline(self, name):
        node = self._graph.nodes.pop(name)
        inputs = data_inputs(node)
        awaited = node.input[len(inputs) :]
        if node.op in _IFS:
            outputs = self._inline_if(node, inputs, awaited)
        elif node.op in LOOPS:
            outputs = self._inline_while(node, inputs, awaited)
        elif node.op in _CASES:
            branches = node.attr["branches"].list.func
            index = int(self._value_of(inputs[0]))
            # As the kernel does it: the last one is for all other numbers.
            branch = branches[index if 0 <= index < len(branches) else -1]
            outputs = self._expand(branch.name, name, inputs[1:], awaited)
        else:
            function = node.attr["f"].func.name if node.op in _CALLS else node.op
            outputs = self._expand(function, name, inputs, awaited)
        targets = {tensor_name(name, port): to for port, to in enumerate(outputs)}
        self._graph.aliases.update(targets)
        # Who fetched an output of the call fetches what takes its place (`tensor`); who
        # waited for the call waits for what it gives.
        targets[f"^{name}"] = f"^{node_name(outputs[0])}" if outputs else f"^{name}"
        self._graph.redirect(targets)
        # Of a loop, those of what it begins with.
        if node.op not in LOOPS and "_output_shapes" in node.attr:
            for output, shape in zip(outputs, node.attr["_output_shapes"].list.shape):
                made = self._graph.nodes.get(output)
                if made is not None and "_output_shapes" not in made.attr:
                    made.attr["_output_shapes"].list.shape.add().CopyFrom(shape)

    def _add(self, scope, op, inputs, dtype, **attributes):
        return self._graph.add(op, f"{scope}/{op}", inputs, T=dtype, **attributes)

    # ------------------------------------------------------------------------- conditions

    def _inline_if(self, node, inputs, awaited):
        flag = self._value_of(inputs[0])
        branches = [node.attr[key].func.name for key in ("else_branch", "then_branch")]
        if flag is not None:
            return self._expand(branches[bool(flag)], node.name, inputs[1:], awaited)
        taken, results = self._types(branches[0])
        switches = [
            self._add(node.name, "Switch", [i, inputs[0], *awaited], dtype)
            for i, dtype in zip(inputs[1:], taken)
        ]
        # What takes nothing from outside, in a branch, waits for the pivot of that.
        pivots = self._add(node.name, "Switch", [inputs[0]] * 2, tf.bool)
        given = []
        for branch, function in enumerate(branches):
            # Not the `Switch` itself, which runs whatever branch is taken.
            pivot = self._graph.add(
                "Identity",
                f"{node.name}/switch_{'ft'[branch]}",
                [tensor_name(pivots, branch)],
                T=tf.bool,
            )
            arguments = [tensor_name(switch, branch) for switch in switches]
            scope = f"{node.name}/{('else', 'then')[branch]}"
            given.append(self._expand(function, scope, arguments, [f"^{pivot}"]))
        return [
            self._add(node.name, "Merge", [no, yes], dtype, N=2)
            for no, yes, dtype in zip(*given, results)
        ]

    # ------------------------------------------------------------------------------ loops

    def _inline_while(self, node, inputs, awaited):
        graph, scope = self._graph, node.name
        condition, body = (node.attr[key].func.name for key in ("cond", "body"))
        types, _ = self._types(body)
        frame = {"frame_name": scope.encode(), "is_constant": False}
        merges, exits, kept = [], [], []
        for source, dtype in zip(inputs, types):
            enter = self._add(
                scope,
                "Enter",
                [source, *awaited],
                dtype,
                parallel_iterations=10,
                **frame,
            )
            # Its second input, of the iteration before, follows when there is one.
            merges.append(self._add(scope, "Merge", [enter], dtype, N=2))
        first = [f"^{merge}" for merge in merges[:1]]
        going_on = self._expand(condition, f"{scope}/cond", merges, first)
        going_on = graph.add("LoopCond", f"{scope}/LoopCond", going_on)
        for merge, dtype in zip(merges, types):
            switch = self._add(scope, "Switch", [merge, going_on], dtype)
            exits.append(self._add(scope, "Exit", [switch], dtype))
            kept.append(self._add(scope, "Identity", [f"{switch}:1"], dtype))
        first = [f"^{name}" for name in kept[:1]]
        results = self._expand(body, f"{scope}/body", kept, first)
        for merge, result, dtype in zip(merges, results, types):
            following = self._add(scope, "NextIteration", [result], dtype)
            graph.nodes[merge].input.append(following)
        return exits

    # -------------------------------------------------------------------------- functions

    def _function(self, name):
        if name not in self._graph.functions:
            raise InliningError(f"the function {name!r} that it calls is not in it")
        return self._graph.functions[name]

    def _types(self, name):
        """The dtypes of what a function takes, and of what it gives."""
        signature = self._function(name).signature
        return tuple(
            [tf.as_dtype(argument.type) for argument in arguments]
            for arguments in (signature.input_arg, signature.output_arg)
        )

    def _expand(self, name, scope, given, awaited):
        """Adds the nodes of a function under `scope`; the inputs that its results are."""
        function = self._function(name)
        arguments = [a.name for a in function.signature.input_arg]
        if len(arguments) != len(given):
            raise InliningError(
                f"{scope!r} gives {len(given)} values to the function {name!r}, which "
                f"takes {len(arguments)}"
            )
        sources = dict(zip(arguments, given))
        operations = {node.name: node for node in function.node_def}
        names = {own: self._graph.free_name(f"{scope}/{own}") for own in operations}

        def input_of(source):
            """What an input of the function's nodes is in the graph."""
            if source.startswith("^"):
                name = source[1:]
                known = node_name(sources[name]) if name in sources else None
                return f"^{known or names.get(name, name)}"
            name, *output = source.split(":")
            if name in sources:
                return sources[name]
            if name not in operations:
                raise InliningError(f"a function takes {source!r}, which is not in it")
            port = int(output[1]) if len(output) == 2 else 0
            if output:
                port += self._first_port(operations[name], output[0])
            return tensor_name(names[name], port)

        for own, definition in operations.items():
            node = tf.NodeDef()
            node.CopyFrom(definition)
            node.name = names[own]
            node.input[:] = map(input_of, definition.input)
            # A constant has nothing else that says in which branch or loop it is.
            if not node.input:
                node.input.extend(awaited)
            self._graph.nodes[node.name] = node
        # Of their own, so that no name of somebody else's is given away.
        return [
            self._graph.add(
                "Identity",
                f"{scope}/result",
                [input_of(function.ret[a.name]), *awaited],
                T=tf.as_dtype(a.type),
            )
            for a in function.signature.output_arg
        ]

    def _first_port(self, node, output):
        """The number of the first tensor of the output `output` of a node."""
        if node.op in self._graph.functions:
            signature = self._graph.functions[node.op].signature
            return [a.name for a in signature.output_arg].index(output)
        definition = self._definitions.get(node.op)
        if definition is None:  # a plain GraphDef tells nothing of operations
            version = node.op.rstrip("0123456789")
            version = version[:-1] if version.endswith("V") else version
            return _PORTS.get((version, output), 0)
        port = 0
        for argument in definition.output_arg:
            if argument.name == output:
                return port
            port += _tensors_of(argument, node)
        raise InliningError(f"{node.op} has no output {output!r}")


def _tensors_of(argument, node):
    if argument.number_attr:
        return node.attr[argument.number_attr].i
    if argument.type_list_attr:
        return len(node.attr[argument.type_list_attr].list.type)
    return 1


def operation_definitions(meta: Any) -> Mapping[str, Any]:
    """OpDef by operation, as a MetaGraphDef has them; none of a plain GraphDef."""
    if meta is None:
        return {}
    return {op.name: op for op in meta.meta_info_def.stripped_op_list.op}
