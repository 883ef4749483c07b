"""What all checks of a graph ask: its layers, its training, its savers, its outputs."""

from __future__ import annotations

from typing import Iterable

from bn_tf1.checkpoints.reader_writer import OBJECT_GRAPH
from bn_tf1.graphs.layer_analysis import Analysis, GraphLayer, analyse, find_folded
from bn_tf1.graphs.node_values import constant_at, variable_name, variables_of
from bn_tf1.graphs.recognition.normalizations import Normalization
from bn_tf1.graphs.training_nodes import Conditions, find_training, is_gradient
from bn_tf1.graphs.update_operations import statistics_of
from bn_tf1.graphs.view import GraphView, ancestors, node_of

# Where the tensors begin among the inputs of an operation that saves.
_SAVES = {"SaveV2": 3, "SaveSlices": 3, "Save": 2}
PARAMETERS = ("gamma", "beta")
# How values leave a condition or a loop of control flow v1.
_WAYS_OUT = ("Merge", "RefMerge", "Exit", "RefExit")


class Facts:
    """The facts of one graph.

    Attributes:
        view: the graph.
        conditions: under which conditions its nodes run.
        layers: its layers.
        folded: what folded layers left behind.
        training: its training steps.
        has_gradients: whether something differentiates it.
        served: 1 for each node that an output of a signature needs; None without
            signatures.
    """

    def __init__(self, view: GraphView):
        self.view = view
        self.conditions = Conditions(view)
        self.layers = analyse(view, self.conditions)
        self.folded = find_folded(view)
        self.training = find_training(view)
        # Somebody may apply them outside of the graph.
        self.has_gradients = bool(self.training.applies) or any(
            is_gradient(view, node) for node in range(len(view))
        )
        self.served = _served(view)
        # Asked for each update, and each as large as the graph: kept.
        self._leading_out: bytearray | None = None
        self._running: dict[int, bytearray] = {}

    def graph_layers(self) -> list[GraphLayer]:
        """The layers as `find_layers` gives them, the folded ones included."""
        return [analysis.layer for analysis in self.layers] + self.folded

    def is_trained(self, layer: Analysis, role: str) -> bool:
        """Whether gradients are applied to the gamma or beta of `layer`."""
        return any(node in self.training.trained for node in layer.variables[role])

    def runs_in_training(self, call: Normalization) -> bool:
        """Whether a training step runs `call`, or the statistics that it takes."""
        nodes = {call.node}
        if call.kind == "composed":
            for sources in statistics_of(self.view, call).values():
                # Those of a fused kernel are references, which are larger.
                nodes |= {node for node in sources if node < len(self.view)}
        nodes.discard(node_of(call.x))
        return any(self.training.runs[node] for node in nodes)

    def writes(self, layer: Analysis, variable: int) -> list[int]:
        """The operations that change a moving statistic."""
        # An update by arithmetic that is not known is another write: both are looked at.
        nodes = list(layer.writes.get(variable, ()))
        nodes += [u.node for u in layer.updates if u.variable == variable]
        return sorted(set(nodes))

    def leads_out(self, node: int) -> bool:
        """Whether a value leaves a condition or loop of control flow v1 after `node`."""
        if self._leading_out is None:
            ends = [n for n, op in enumerate(self.view.ops) if op in _WAYS_OUT]
            self._leading_out = ancestors(self.view, ends)
        return bool(self._leading_out[node])

    def runs_with_its_body(self, node: int) -> bool:
        """Whether each call of the function that `node` is in runs it."""
        index = self.view.body_of(node)
        if index not in self._running:
            body = self.view.bodies[index]
            self._running[index] = ancestors(self.view, body.returns + body.controls)
        return bool(self._running[index][node])

    def names_of(self, variables: Iterable[int]) -> str:
        """The names of variables, for a message."""
        names = {variable_name(self.view, node) for node in variables}
        return ", ".join(sorted(names))

    def saved_by(self, saves: Iterable[int]) -> frozenset[int]:
        """The variables that operations which save, save."""
        saved: set[int] = set()
        for node in saves:
            for source in self.view.inputs[node][_SAVES[self.view.ops[node]] :]:
                saved.update(variables_of(self.view, source))
        return frozenset(saved)

    def is_saved_by_object(self) -> bool:
        """Whether a saver saves objects with all their variables, and no list of them."""
        # A checkpoint of objects has its description among the names that are saved.
        names = [constant_at(self.view, self.view.inputs[n][1]) for n in self.saves()]
        key = OBJECT_GRAPH.encode()
        return any(n is not None and key in n.ravel().tolist() for n in names)

    def saves(self) -> list[int]:
        """The operations that save variables."""
        return [
            node
            for node, op in enumerate(self.view.ops)
            if op in _SAVES and len(self.view.inputs[node]) >= _SAVES[op]
        ]

    def saves_of_saver(self) -> list[int]:
        """Those of the saver that is described beside the graph; may be none."""
        saver = self.view.saver
        earlier = self.view.needed([] if saver is None else [saver.save_tensor_name])
        return [save for save in self.saves() if earlier and earlier[save]]


def _served(view):
    # A signature for training may be there beside those that are served.
    return view.needed(
        name
        for key, outputs in sorted(view.signatures.items())
        if "train" not in key
        for name in outputs
    )
