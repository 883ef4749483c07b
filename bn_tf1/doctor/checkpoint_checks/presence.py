"""What is in a checkpoint and what is not: statistics, their sizes, slots beside them.

A `tf.train.Saver` of the trainable variables leaves the statistics out and says nothing.
What is missing can only be told from what is there: a gamma and a beta without
statistics are a layer normalisation, too, so that names and the other layers decide.
"""

from __future__ import annotations

import re
from typing import Any, Sequence

from bn_tf1.checkpoints.dialects import STATISTICS, find_slot, unnumbered
from bn_tf1.checkpoints.found_layers import CheckpointLayer
from bn_tf1.checkpoints.object_names import is_saved_by_object, variable_names
from bn_tf1.checkpoints.tensor_file import TensorFile
from bn_tf1.doctor.checkpoint_checks.numbers import to_recalibrate
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by

_BATCH_NORM = re.compile(r"batch_?norm|(^|[^a-z])bn([^a-z]|$)", re.IGNORECASE)
_OTHER_NORM = re.compile(
    r"(layer|group|instance|rms|weight|channel|filter_response|pixel|adaptive|ada)_?"
    r"norm|(^|[^a-z])(ln|gn|in|adain)([^a-z]|$)",
    re.IGNORECASE,
)
# As the optimizers of TensorFlow call their slots, the second and third numbered.
_SLOT = re.compile(
    r"(adam\w*|n?adamax|momentum|rmsprop|adagrad\w*|adadelta|ftrl|amsgrad|lamb|lars)"
    r"(_\d+)?$",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"(?P<scope>.+)/(?P<role>gamma|beta)$")


def check_presence(
    file: TensorFile,
    layers: Sequence[CheckpointLayer],
    graph_layers: Sequence[Any] = (),
) -> list[Finding]:
    """Findings on statistics that are missing and on sizes that disagree."""
    findings = []
    slots = _slots_of_statistics(file, layers)
    for layer in layers:
        findings += _half_a_layer(file, layer)
        findings += _sizes(file, layer)
        findings += _slots(file, layer, slots)
    if graph_layers and is_saved_by_object(file):
        return findings  # an object is saved whole, whatever its variables are called
    if graph_layers:
        # It tells which gamma and beta are those of a batch norm with moving statistics.
        return findings + _missing_for_the_graph(file, layers, graph_layers)
    return findings + _parameters_alone(file, layers)


def _half_a_layer(file, layer):
    missing = [role for role in STATISTICS if role not in layer.names]
    if not missing:
        return
    (there,) = (layer.names[role] for role in STATISTICS if role in layer.names)
    yield _missing(
        file,
        layer.scope,
        certainty="certain",
        what=f"{there} is in the checkpoint, but the {missing[0]} of the layer is not.",
    )


def _slots_of_statistics(file, layers):
    """Names of optimizer slots by the name of the moving statistic that they are of."""
    statistics = {
        layer.names[role]
        for layer in layers
        for role in layer.names
        if role in STATISTICS
    }
    found: dict[str, list[str]] = {}
    for name in file.tensors:
        variable, is_object_slot, _ = name.partition("/.OPTIMIZER_SLOT/")
        if is_object_slot:
            variable += "/.ATTRIBUTES/VARIABLE_VALUE"
        elif _SLOT.match(name.rpartition("/")[2]):
            slot = find_slot(name, statistics)
            variable = slot.variable if slot is not None else ""
        else:
            continue
        if variable in statistics:
            found.setdefault(variable, []).append(name)
    return found


def _slots(file, layer, slots):
    own = [name for role in STATISTICS for name in slots.get(layer.names.get(role), ())]
    if own:
        yield found_by(
            "optimizer-slots",
            source=to_recalibrate(file.prefix),
            certainty="likely",
            layer=layer.scope,
            where=f"{file.prefix}: {own[0]}",
            what=f"An optimizer has {', '.join(own[:4])}.",
        )


def _missing(file, scope, *, certainty, what, gravity="error"):
    return found_by(
        "statistics-missing",
        gravity=gravity,
        certainty=certainty,
        layer=scope,
        where=file.prefix,
        what=what,
    )


def _sizes(file, layer):
    shapes = {role: file.tensors[name].shape for role, name in layer.names.items()}
    sizes = {role: file.tensors[name].elements for role, name in layer.names.items()}
    statistics = {sizes[role] for role in STATISTICS if role in sizes}
    # One gamma for all channels can be meant so; of statistics there is one for each.
    others = {size for role, size in sizes.items() if role not in STATISTICS} - {1}
    if len(statistics | others) < 2:
        return
    listed = ", ".join(f"{layer.names[r]} {list(s)}" for r, s in shapes.items())
    yield found_by(
        "sizes-differ",
        certainty="certain",
        layer=layer.scope,
        where=file.prefix,
        what=f"The variables of one layer have different sizes: {listed}.",
    )


def _missing_for_the_graph(file, layers, graph_layers):
    plain = variable_names(file)
    known = {layer.scope for layer in layers}
    findings = []
    for graph_layer in graph_layers:
        names = [graph_layer.moving_mean, graph_layer.moving_variance]
        names = [re.sub(r"/part_\d+$", "", name) for name in names if name]
        missing = [name for name in names if name not in plain]
        if missing and graph_layer.name not in known:
            finding = _missing(
                file,
                graph_layer.name,
                certainty="likely",  # a saver can give a variable another name
                what=f"The graph has {' and '.join(missing)}, the checkpoint has not.",
            )
            findings.append(finding)
    return findings


def _parameters_alone(file, layers):
    """Scopes with a gamma or beta, but no statistics, that ought to have them."""
    used = {name for layer in layers for name in layer.names.values()}
    scopes: dict[str, list[str]] = {}
    for plain, full in variable_names(file).items():
        match = _PARAMETER.match(plain)
        if match is None or full in used:
            continue
        # An object is saved whole: what has no statistics there is a layer norm, unless
        # its name tells otherwise.
        if full == plain or _BATCH_NORM.search(match["scope"]):
            scopes.setdefault(match["scope"], []).append(match["role"])
    families = {unnumbered(layer.scope) for layer in layers}
    findings = []
    for scope, roles in scopes.items():
        grade = _grade(scope, roles, families)
        if grade is not None:
            gravity, certainty = grade
            what = f"There is {' and '.join(sorted(roles))}, but neither a moving mean "
            what += "nor a moving variance"
            what += "." if gravity == "error" else "; a layer norm has none."
            findings.append(
                _missing(file, scope, gravity=gravity, certainty=certainty, what=what)
            )
    return findings


def _grade(scope, roles, families):
    """(gravity, certainty) of gamma and beta without statistics; None for no finding."""
    last = "/".join(scope.split("/")[-2:])
    if _OTHER_NORM.search(last) and not _BATCH_NORM.search(scope.split("/")[-1]):
        return None
    if _BATCH_NORM.search(last) or (unnumbered(scope) in families):
        return "error", "likely"
    if len(roles) < 2:
        return None
    return ("warning", "possible") if families else ("note", "possible")
