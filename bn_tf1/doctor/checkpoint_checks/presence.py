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
    findings: list[Finding] = []
    slots = _slots_of_statistics(file, layers)
    for layer in layers:
        findings += _half_a_layer(file, layer)
        findings += _sizes(file, layer)
        findings += _slots(file, layer, slots)
    if not graph_layers:
        findings += _parameters_alone(file, layers)
    elif not is_saved_by_object(file):
        # The graph tells which gamma and beta are those of a batch norm with moving
        # statistics. An object is saved whole, whatever its variables are called.
        findings += _missing_for_the_graph(file, layers, graph_layers)
    return findings


def _half_a_layer(file, layer):
    missing = [role for role in STATISTICS if role not in layer.names]
    if not missing:
        return
    (there,) = (layer.names[role] for role in STATISTICS if role in layer.names)
    what = f"{there} is in the checkpoint, but the {missing[0]} of the layer is not."
    yield _missing(file, layer.scope, "error", "certain", what)


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
        # Not every tensor below a statistic: averages keep theirs there, too.
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
            "likely",
            f"{file.prefix}: {own[0]}",
            f"An optimizer has {', '.join(own[:4])}.",
            layer=layer.scope,
            source=to_recalibrate(file.prefix),
        )


def _missing(file, scope, gravity, certainty, what):
    check, where = "statistics-missing", file.prefix
    return found_by(check, certainty, where, what, gravity=gravity, layer=scope)


def _sizes(file, layer):
    shapes = {role: file.tensors[name].shape for role, name in layer.names.items()}
    sizes = {role: file.tensors[name].elements for role, name in layer.names.items()}
    statistics = {sizes[role] for role in STATISTICS if role in sizes}
    # One gamma for all channels can be meant so; of statistics there is one for each.
    others = {size for role, size in sizes.items() if role not in STATISTICS} - {1}
    if len(statistics | others) < 2:
        return
    listed = ", ".join(f"{layer.names[r]} {list(s)}" for r, s in shapes.items())
    what = f"The variables of one layer have different sizes: {listed}."
    yield found_by("sizes-differ", "certain", file.prefix, what, layer=layer.scope)


def _missing_for_the_graph(file, layers, graph_layers):
    plain = variable_names(file)
    known = {layer.scope for layer in layers}
    for graph_layer in graph_layers:
        names = [graph_layer.moving_mean, graph_layer.moving_variance]
        # A partitioned variable is saved as one tensor.
        names = [re.sub(r"/part_\d+$", "", name) for name in names if name]
        missing = [name for name in names if name not in plain]
        if missing and graph_layer.name not in known:
            what = f"The graph has {' and '.join(missing)}, the checkpoint has not."
            # No more than likely: a saver can give a variable another name.
            yield _missing(file, graph_layer.name, "error", "likely", what)


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
    for scope, roles in scopes.items():
        grade = _grade(scope, roles, families)
        if grade is not None:
            what = f"There is {' and '.join(sorted(roles))}, but neither a moving mean "
            what += "nor a moving variance"
            what += "." if grade[0] == "error" else "; a layer norm has none."
            yield _missing(file, scope, *grade, what)


def _grade(scope, roles, families):
    """(gravity, certainty) of gamma and beta without statistics; None for no finding."""
    # The last two parts are the layer's own; a block farther out may be called anything.
    last = "/".join(scope.split("/")[-2:])
    if _OTHER_NORM.search(last) and not _BATCH_NORM.search(scope.split("/")[-1]):
        return None
    if _BATCH_NORM.search(last) or (unnumbered(scope) in families):
        return "error", "likely"
    if len(roles) < 2:  # many things have a beta
        return None
    return ("warning", "possible") if families else ("note", "possible")
