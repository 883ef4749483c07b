"""Batch norms that one kernel computes.

FusedBatchNorm, V2, V3, _FusedBatchNormEx, the oneDNN rewritings (_MklFusedBatchNorm...),
batch norms fused into a convolution and the old BatchNormWithGlobalNormalization.
"""

from __future__ import annotations

from bn_tf1.compiled.kernel import FORWARD
from bn_tf1.graphs.node_values import (
    integers,
    is_fused,
    leaves,
    origin,
    scalars,
    static_shape,
    variables_of,
)
from bn_tf1.graphs.recognition.batch_statistics import layout_of
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.view import GraphView, node_of, reference_to

FUSED_CONVOLUTIONS = (
    "_FusedConv2D",
    "_FusedDepthwiseConv2dNative",
    "_MklFusedConv2D",
    "_MklNativeFusedConv2D",
    "_MklFusedDepthwiseConv2dNative",
    "_MklNativeFusedDepthwiseConv2dNative",
)
_GLOBAL = "BatchNormWithGlobalNormalization"


def match_fused(view: GraphView, node: int) -> Normalization | None:
    """The batch norm that the kernel at `node` computes, or None."""
    op, inputs = view.ops[node], view.inputs[node]
    if op in FUSED_CONVOLUTIONS:
        # x and the weights come first; other chains, such as bias and relu, are no layer.
        fused = view.attribute(node, "fused_ops")
        if fused is None or b"FusedBatchNorm" not in fused.list.s or len(inputs) < 6:
            return None
        operands = (inputs[0],) + inputs[2:6]
    elif op == _GLOBAL and len(inputs) >= 5:  # its operands have another order
        x, mean, variance, beta, gamma = inputs[:5]
        operands = (x, gamma, beta, mean, variance)
    elif op == FORWARD:
        return _compiled(view, node)
    elif is_fused(op) and len(inputs) >= 5:
        operands = inputs[:5]
    else:
        return None
    x, gamma, beta, mean, variance = operands
    flag = view.attribute(node, "is_training")
    training = is_fused(op) and (flag is None or flag.b)  # true by default
    if training and _is_layer_norm(view, x, gamma, beta):
        return None
    layout = view.attribute(node, "data_format")
    layout = "NHWC" if layout is None else layout.s.decode("utf-8", "replace")
    found = Normalization(
        node,
        "fused",
        op,
        x,
        gamma,
        beta,
        epsilon=_number(view, node, "epsilon" if op != _GLOBAL else "variance_epsilon"),
        layout={"NDHWC": "NHWC", "NCDHW": "NCHW"}.get(layout, layout),
        mode="training" if training else "inference",
        axes=(0, 2, 3) if layout.startswith("NC") else (0, 1, 2),
    )
    # In training the moving statistics come in only where the kernel averages them itself.
    if training and (_number(view, node, "exponential_avg_factor") or 1.0) >= 1.0:
        return found
    return found._replace(
        mean=mean,
        variance=variance,
        mean_leaves=leaves(view, mean),
        variance_leaves=leaves(view, variance),
    )


def _compiled(view, node):
    """What kernel="compiled" makes: it has no statistics but those of the batch."""
    x, gamma, beta = view.inputs[node][:3]
    axis, shape = view.attribute(node, "axis"), static_shape(view, x)
    axes = None
    if axis is not None and shape is not None:
        axes = tuple(a for a in range(len(shape)) if a != axis.i)
    found = Normalization(node, "fused", FORWARD, x, gamma, beta, axes=axes)
    epsilon = _number(view, node, "epsilon")
    return found._replace(epsilon=epsilon, layout=layout_of(view, x, axes))


def _is_layer_norm(view, x, gamma, beta):
    """Layer and group norms reshape to [1, N, ...] and scale after the kernel."""
    node = node_of(x)
    if view.ops[node] != "Reshape" or variables_of(view, gamma):
        return False
    shape = node_of(origin(view, view.inputs[node][1]))
    # [1, batch * groups, ...], of which the batch is often known as the graph runs alone.
    if view.ops[shape] == "Pack" and view.inputs[shape]:
        first = scalars(view, view.inputs[shape][0])
    else:
        sizes = integers(view, reference_to(shape))
        first = sizes[:1] if sizes else ()
    return tuple(first) == (1,) and not variables_of(view, beta)


def _number(view, node, name):
    value = view.attribute(node, name)
    if value is None:  # 1e-4 is the kernel's own, which a file may leave out
        return 1e-4 if name.endswith("epsilon") else None
    return float(f"{value.f:.7g}")  # a float32: 0.001 and not 0.0010000000474974513
