"""Whether nothing but a ReLU takes what a batch norm gives.

Then a channel that is never above 0 is lost: the ReLU gives 0 for it and passes no
gradient. A leaky ReLU, an addition before the ReLU (the shortcut of a residual network),
or any second user of the output still see such a channel.
"""

from __future__ import annotations

from bn_tf1.graphs.node_values import scalars
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.training_nodes import is_gradient
from bn_tf1.graphs.view import GraphView, node_of, reference_to

_RELUS = frozenset(["Relu", "Relu6"])
# The values in another shape, type or place.
_COPIES = frozenset(
    ["Identity", "IdentityN", "Cast", "Reshape", "Squeeze", "ExpandDims", "Transpose"]
    + ["CheckNumerics", "Snapshot", "PreventGradient", "Switch", "Merge", "Enter"]
    + ["Exit", "_Arg", "_Ret"]
)
# These take the size of the values or look at them, or keep them for the gradient of a
# condition or loop.
_LOOKS = frozenset(
    ["Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "Assert", "Print"]
    + ["OptionalFromValue", "TensorListPushBack", "StackPush", "StackPushV2"]
)
_STEPS = 200


def is_rectified(view: GraphView, normalization: Normalization) -> bool:
    """Whether a ReLU takes the output of `normalization`, and nothing else does."""
    node = normalization.node
    if _is_fused_with_relu(view, node):
        return True
    seen, pending = {reference_to(node)}, [reference_to(node)]
    found = False
    while pending:
        reference = pending.pop()
        for consumer in view.consumers(node_of(reference), _STEPS):
            further = _follow(view, reference, consumer)
            if further is None:
                return False
            found = found or _is_relu(view, consumer, reference)
            # Each once: a loop comes back to where it began.
            pending += [one for one in further if one not in seen]
            seen.update(further)
        if len(seen) > _STEPS:
            return False  # not seen to the end
    return found


def _is_fused_with_relu(view, node):
    mode = view.attribute(node, "activation_mode")  # of _FusedBatchNormEx
    if mode is not None and mode.s == b"Relu":
        side = view.attribute(node, "num_side_inputs")
        return side is None or side.i == 0
    activation = view.attribute(node, "activation")  # of kernel="compiled"
    if activation is not None and activation.s in (b"relu", b"relu6"):
        residuals = view.attribute(node, "residuals")
        return residuals is None or residuals.i == 0
    fused = view.attribute(node, "fused_ops")  # of _FusedConv2D
    return fused is not None and list(fused.list.s[-1:]) in ([b"Relu"], [b"Relu6"])


def _follow(view, reference, consumer):
    """Where the values go on from `consumer`; None where something else is computed."""
    places = [i for i, taken in enumerate(view.inputs[consumer]) if taken == reference]
    op = view.ops[consumer]
    is_look = op in _LOOKS or "Summary" in op or _is_for_gradients(view, consumer)
    # Who only waits for it, or asks its size, sees no channel that is lost.
    if not places or is_look or _is_relu(view, consumer, reference):
        return []
    if op in _COPIES:
        return _copies(view, consumer, places)
    if op == "Minimum" and all(
        n > 0 for n in _bounds(view, consumer, reference) or [0]
    ):
        return [reference_to(consumer)]  # tf.clip_by_value(x, 0, 6)
    return None


def _is_for_gradients(view, node):
    if view.ops[node] != "_Arg":
        return is_gradient(view, node)
    # An argument of a gradient's function is as little a user as the gradient.
    callers = view.callers.get(view.body_of(node), ())
    return all(is_gradient(view, caller) for caller in callers)


def _copies(view, node, places):
    op = view.ops[node]
    if op == "IdentityN":
        return [reference_to(node, place) for place in places]
    if op == "Switch":
        return [reference_to(node, port) for port in (0, 1)] if 0 in places else []
    if op == "_Ret":
        body = view.body_of(node)
        port = view.bodies[body].returns.index(node)
        return [reference_to(caller, port) for caller in view.callers.get(body, ())]
    # A shape or permutation is no input whose values go on.
    return [reference_to(node)] if 0 in places or op in ("Merge", "_Arg") else []


def _is_relu(view, node, reference):
    if view.ops[node] in _RELUS:
        return True
    return view.ops[node] == "Maximum" and _bounds(view, node, reference) == {0.0}


def _bounds(view, node, reference):
    """The numbers that the other input of a Maximum or Minimum may be."""
    others = [taken for taken in view.inputs[node] if taken != reference]
    return scalars(view, others[0]) if len(others) == 1 else frozenset()
