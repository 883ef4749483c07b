"""Which tensors of a graph go in and come out: as asked for, as served, or as found."""

from __future__ import annotations

from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.editable_graph import (
    canonical,
    node_name,
    port_in,
    tensor_name,
)
from bn_tf1.graphs.rewriting.graph_interface import (
    PIPELINES,
    Candidate,
    Interface,
    candidate_of,
    find_interface,
)
from bn_tf1.graphs.rewriting.inference_mode import PLACEHOLDERS, Mode
from bn_tf1.graphs.view import reference_to
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.graph_sources import Source

_MOST_NAMED = 3
_MOST_LISTED = 40


class Wishes(NamedTuple):
    """What a user says of a graph; see `export`."""

    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    settings: Mapping[str, Any] = {}


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _listed(candidates):
    return "".join(f"\n  {candidate}" for candidate in candidates[:_MOST_LISTED])


def served_tensors(source: Source) -> tuple:
    """([(tensor, key)], [(tensor, key)]) of the signature; empty without one."""
    if source.signature is None:
        return [], []
    return tuple(
        [
            (canonical(info.name), key)
            for key, info in sorted(infos.items())
            if info.name
        ]
        for infos in (source.signature.inputs, source.signature.outputs)
    )


class Ends:
    """The inputs and outputs of what is served.

    Args:
        mode: the graph.
        wishes: what is asked for.
        served: `served_tensors` of the source.
    """

    def __init__(self, mode: Mode, wishes: Wishes, served):
        self._mode = mode
        self._view = mode.view
        self._wishes = wishes
        self._served_inputs = [name for name, _ in served[0]]
        self._served_outputs = [name for name, _ in served[1]]
        self._known: Interface | None = None

    def found(self) -> Interface:
        """What the graph itself tells."""
        # Only where nobody says it: to find it takes longer than the rest.
        if self._known is None:
            self._known = find_interface(self._view, self._mode.values)
        return self._known

    def outputs(self) -> tuple[Candidate, ...]:
        """The outputs, as they are called in the source.

        Raises:
            ExportError: one is not there, or nobody says which of several it is.
        """
        names = self._wishes.outputs or self._served_outputs
        if names:
            return tuple(self._candidate(name, "outputs") for name in names)
        found = self.found().outputs
        if len(found) == 1:
            return found
        raise ExportError(
            f"the graph has {len(found) or 'no'} tensors that may be its output: name "
            f"it with `--outputs`{_listed(found)}"
        )

    def asked_inputs(self) -> tuple[Candidate, ...]:
        """The inputs that the user or the signature names."""
        names = self._wishes.inputs or self._served_inputs
        return tuple(self._candidate(name, "inputs") for name in names)

    def _candidate(self, name, flag):
        tensor = self._mode.graph.tensor(name)
        node = self._view.find(tensor)
        if node is None:
            found = getattr(self.found(), flag)
            raise ExportError(
                f"`--{flag} {name}` names no tensor that there is in inference; the "
                f"graph tells of{_listed(found) or ' none'}"
            )
        return candidate_of(self._view, reference_to(node, port_in(tensor)))

    def data(self, outputs: Sequence[str]) -> list[str]:
        """The nodes that data comes in by, as far as they are needed.

        A placeholder of any rank, as keep_prob often is one, is data where none other is.
        """
        needed = self._mode.graph.ancestors(outputs)
        found = [name for name in needed if self._is_source(name)]
        nodes = self._mode.graph.nodes
        return [
            name
            for name in found
            if nodes[name].op in PIPELINES or nodes[name].attr["shape"].shape.dim
        ] or found

    def _is_source(self, name):
        node = self._mode.graph.nodes[name]
        if node.op in PIPELINES:
            return True
        if node.op not in PLACEHOLDERS or _is_default(self._mode.graph, name):
            return False
        # A scalar is a rate or a mode; what has no shape in the file can be anything.
        shape = node.attr["shape"].shape
        return bool(shape.dim) or shape.unknown_rank or "shape" not in node.attr

    def inputs(self, outputs: Sequence[str]) -> tuple[Candidate, ...]:
        """The inputs that the nodes `outputs` need; defaults become what they are.

        Raises:
            ExportError: one is of no use, or what it is cannot be told.
        """
        graph = self._mode.graph
        asked = self.asked_inputs()
        cut = {canonical(c.tensor) for c in asked}
        needed = _needed_up_to(graph, outputs, cut)
        for candidate in asked:
            if node_name(canonical(candidate.tensor)) not in needed:
                raise ExportError(
                    f"`--inputs {candidate.tensor}`: no output needs it; they need "
                    f"{some(sorted(self.data(outputs)))}"
                )
        found = []
        for name in graph.nodes:
            node = graph.nodes[name]
            if name not in needed or name in cut:
                continue
            if node.op == "PlaceholderWithDefault" and _is_default(graph, name):
                graph.make_identity(name, node.input[0])
            elif node.op in PLACEHOLDERS or node.op in PIPELINES:
                found += self._tensors(name, needed, cut)
        if self._wishes.inputs is None:
            undecided = [c for c in found if c in self.found().labels or c.shape == ()]
        else:
            undecided = found  # who named inputs has named all
        if undecided:
            raise ExportError(self._undecided(undecided[0]))
        return asked + tuple(c for c in found if c not in asked)

    def _tensors(self, name, needed, cut):
        ports = sorted(
            {
                port_in(source)
                for user in needed
                for source in self._mode.graph.nodes[user].input
                if node_name(source) == name and not source.startswith("^")
            }
        )
        tensors = [tensor_name(name, port) for port in ports or [0]]
        # An iterator gives images and labels by one node: each is an input of its own.
        tensors = [self._named(tensor, needed) for tensor in tensors]
        return [self._candidate(t, "inputs") for t in tensors if t not in cut]

    def _named(self, tensor, needed):
        """What the program called a value of its input pipeline, where it gave a name."""
        nodes = self._mode.graph.nodes
        if nodes[node_name(tensor)].op in PLACEHOLDERS:
            return tensor
        while True:
            users = [name for name in needed if tensor in nodes[name].input]
            if len(users) != 1 or nodes[users[0]].op != "Identity":
                return tensor
            tensor = users[0]

    def _undecided(self, candidate):
        name = canonical(candidate.tensor)
        if candidate in self.found().labels:
            return (
                f"the outputs depend on {candidate}, which looks like a label: name "
                f"other outputs, or name it as an input with `--inputs`"
            )
        remedies = [
            "name it with `--inputs`",
            f"give its value with `--set {name}=VALUE`",
        ]
        if candidate.shape == () or candidate.dtype == tf.bool:
            remedies.reverse()  # what it likely is comes first
        return f"the outputs depend on {candidate}: {', or '.join(remedies)}"


def _is_default(graph, name):
    """Whether a placeholder has a default that is constant."""
    node = graph.nodes[name]
    if node.op != "PlaceholderWithDefault":
        return False
    return all(
        graph.nodes[source].op not in (*PIPELINES, "Placeholder", "PlaceholderV2")
        for source in graph.ancestors([node_name(node.input[0])])
    )


def _is_fed(graph, name):
    """Whether data comes in at a node, so that nothing before it is needed."""
    op = graph.nodes[name].op
    is_default = op == "PlaceholderWithDefault" and not _is_default(graph, name)
    return op in PIPELINES or is_default


def _needed_up_to(graph, outputs, cut):
    """The nodes that the outputs need when the tensors `cut` are given."""
    found = set(outputs)
    pending = list(found)
    while pending:
        for source in graph.nodes[pending.pop()].input:
            name = node_name(source)
            if name in found or name not in graph.nodes:
                continue
            found.add(name)
            if source not in cut and not _is_fed(graph, name):
                pending.append(name)
    return found
