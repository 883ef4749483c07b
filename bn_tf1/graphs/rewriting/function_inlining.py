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
    node_name,
    set_attributes,
    tensor_name,
)

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_IFS = ("If", "StatelessIf", "_If")
_CASES = ("Case", "StatelessCase")
_WHILES = ("While", "StatelessWhile", "_While")
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
    pending = [name for name in graph.nodes if inliner.is_inlined(name)]
    count = 0
    while pending:
        count += 1
        if count > _MAX_INLINED:
            raise InliningError(
                f"its functions are called more than {_MAX_INLINED} times"
            )
        before = set(graph.nodes)
        inliner.inline(pending.pop())
        pending += [n for n in graph.nodes if n not in before and inliner.is_inlined(n)]


class _Inliner:
    def __init__(self, graph, definitions, value_of):
        self._graph = graph
        self._definitions = definitions
        self._value_of = value_of

    def is_inlined(self, name):
        node = self._graph.nodes[name]
        if node.op in _CASES:
            return self._value_of(node.input[0]) is not None
        return node.op in _CALLS + _IFS + _WHILES or node.op in self._graph.functions

    def inline(self, name):
        node = self._graph.nodes.pop(name)
        inputs = [i for i in node.input if not i.startswith("^")]
        awaited = [i for i in node.input if i.startswith("^")]
        if node.op in _IFS:
            outputs = self._inline_if(node, inputs, awaited)
        elif node.op in _WHILES:
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
        if outputs and "_output_shapes" in node.attr and node.op not in _WHILES:
            self._note_shapes(outputs, node.attr["_output_shapes"].list.shape)

    def _note_shapes(self, outputs, shapes):
        for output, shape in zip(outputs, shapes):
            made = self._graph.nodes.get(output)
            if made is not None and "_output_shapes" not in made.attr:
                made.attr["_output_shapes"].list.shape.add().CopyFrom(shape)

    # ------------------------------------------------------------------------- conditions

    def _inline_if(self, node, inputs, awaited):
        flag = self._value_of(inputs[0])
        branches = [node.attr[key].func.name for key in ("else_branch", "then_branch")]
        if flag is not None:
            return self._expand(branches[bool(flag)], node.name, inputs[1:], awaited)
        types = self._argument_types(branches[0])
        switches = [
            self._graph.add(
                "Switch", f"{node.name}/Switch", [i, inputs[0]] + awaited, T=dtype
            )
            for i, dtype in zip(inputs[1:], types)
        ]
        pivots = self._graph.add(
            "Switch", f"{node.name}/Switch", [inputs[0]] * 2, T=tf.bool
        )
        given = []
        for branch, function in enumerate(branches):
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
            self._graph.add("Merge", f"{node.name}/Merge", [no, yes], T=dtype, N=2)
            for no, yes, dtype in zip(*given, self._result_types(branches[0]))
        ]

    # ------------------------------------------------------------------------------ loops

    def _inline_while(self, node, inputs, awaited):
        graph, scope = self._graph, node.name
        types = self._argument_types(node.attr["body"].func.name)
        merges, exits = [], []
        for source, dtype in zip(inputs, types):
            enter = graph.add(
                "Enter",
                f"{scope}/Enter",
                [source] + awaited,
                T=dtype,
                frame_name=scope.encode(),
                is_constant=False,
                parallel_iterations=10,
            )
            # Its second input, of the iteration before, follows when there is one.
            merges.append(graph.add("Merge", f"{scope}/Merge", [enter], T=dtype, N=2))
        first = [f"^{merges[0]}"] if merges else []
        (condition,) = self._expand(
            node.attr["cond"].func.name, f"{scope}/cond", merges, first
        )
        going_on = graph.add("LoopCond", f"{scope}/LoopCond", [condition])
        kept = []
        for merge, dtype in zip(merges, types):
            switch = graph.add("Switch", f"{scope}/Switch", [merge, going_on], T=dtype)
            exits.append(graph.add("Exit", f"{scope}/Exit", [switch], T=dtype))
            kept.append(
                graph.add("Identity", f"{scope}/Identity", [f"{switch}:1"], T=dtype)
            )
        first = [f"^{kept[0]}"] if kept else []
        results = self._expand(
            node.attr["body"].func.name, f"{scope}/body", kept, first
        )
        for merge, result, dtype in zip(merges, results, types):
            following = graph.add(
                "NextIteration", f"{scope}/NextIteration", [result], T=dtype
            )
            graph.nodes[merge].input.append(following)
        return exits

    # -------------------------------------------------------------------------- functions

    def _function(self, name):
        if name not in self._graph.functions:
            raise InliningError(f"the function {name!r} that it calls is not in it")
        return self._graph.functions[name]

    def _argument_types(self, name):
        return [tf.as_dtype(a.type) for a in self._function(name).signature.input_arg]

    def _result_types(self, name):
        return [tf.as_dtype(a.type) for a in self._function(name).signature.output_arg]

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
        place = _Body(sources, operations, names, self._first_port)
        for own, definition in operations.items():
            node = tf.NodeDef()
            node.CopyFrom(definition)
            node.name = names[own]
            node.input[:] = [place.input(i) for i in definition.input]
            # A constant has nothing else that says in which branch or loop it is.
            if not node.input:
                node.input.extend(awaited)
            self._graph.nodes[node.name] = node
        results = [
            place.input(function.ret[a.name]) for a in function.signature.output_arg
        ]
        return [
            self._own_result(scope, result, a.type, awaited)
            for result, a in zip(results, function.signature.output_arg)
        ]

    def _own_result(self, scope, source, dtype, awaited):
        """A node for a result, so that no name of somebody else's is given away."""
        name = self._graph.add("Identity", f"{scope}/result", [source] + list(awaited))
        set_attributes(self._graph.nodes[name], T=tf.as_dtype(dtype))
        return name

    def _first_port(self, node, output):
        """The number of the first tensor of the output `output` of a node."""
        if node.op in self._graph.functions:
            signature = self._graph.functions[node.op].signature
            return [a.name for a in signature.output_arg].index(output)
        definition = self._definitions.get(node.op)
        if definition is None:
            version = node.op.rstrip("0123456789")
            version = version[:-1] if version.endswith("V") else version
            return _PORTS.get((version, output), 0)
        port = 0
        for argument in definition.output_arg:
            if argument.name == output:
                return port
            port += _tensors_of(argument, node)
        raise InliningError(f"{node.op} has no output {output!r}")


class _Body:
    """What the inputs of a function's nodes mean in the graph."""

    def __init__(self, sources, operations, names, first_port):
        self._sources = sources
        self._operations = operations
        self._names = names
        self._first_port = first_port

    def input(self, source):
        if source.startswith("^"):
            name = source[1:]
            if name in self._sources:
                return f"^{node_name(self._sources[name])}"
            return f"^{self._names.get(name, name)}"
        name, *output = source.split(":")
        if name in self._sources:
            return self._sources[name]
        if name not in self._operations:
            raise InliningError(f"a function takes {source!r}, which is not in it")
        port = int(output[1]) if len(output) == 2 else 0
        if output:
            port += self._first_port(self._operations[name], output[0])
        return tensor_name(self._names[name], port)


def _tensors_of(argument: Any, node: Any) -> int:
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
