"""`export`: a training graph and its checkpoint become a checked model for serving.

Contract: the graph is changed as protocol buffers; TensorFlow sees it when it is clean,
in a process of its own. Everything is checked before anything is written, what is there
is never written over, and nothing is left half-written.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from bn_tf1.graphs.rewriting.any_batch import allow_any_batch
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph
from bn_tf1.graphs.rewriting.extraction import extract
from bn_tf1.graphs.rewriting.folding import fold as fold_layers
from bn_tf1.graphs.rewriting.graph_interface import Candidate
from bn_tf1.graphs.rewriting.moving_statistics import take_moving_statistics
from bn_tf1.serving import model_formats
from bn_tf1.serving.checking import Examples, Measured, measure, read_examples
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.graph_sources import open_source
from bn_tf1.serving.isolated_run import Isolated
from bn_tf1.serving.new_statistics import take_new_statistics, with_new_statistics
from bn_tf1.serving.preparing import (
    Model,
    NewLayer,
    Wishes,
    interface_of,
    prepare,
    with_stored_pixels,
)
from bn_tf1.serving.writing import check_new, write_model

_BATCHES = ("any", "keep", "whole")
_TIME_LIMIT_SECS = 600.0


class Export(NamedTuple):
    """What `export` made; its str() tells it.

    Attributes:
        path: what was written.
        format: "saved_model", "frozen", "tflite" or "onnx".
        inputs, outputs: the tensors.
        changed: what was done to the graph, a sentence each.
        left: what was left as it is, and why, a sentence each.
        checks: what was measured, a sentence each.
    """

    path: str
    format: str
    inputs: tuple[Candidate, ...]
    outputs: tuple[Candidate, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]
    checks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"input   {candidate}" for candidate in self.inputs]
        lines += [f"output  {candidate}" for candidate in self.outputs]
        lines += [f"changed {text}" for text in self.changed]
        lines += [f"left    {text}" for text in self.left]
        lines += [f"checked {text}" for text in self.checks]
        return "\n".join([*lines, f"{self.path} is written"])


def export(
    source: str,
    out: str,
    *,
    checkpoint: str | None = None,
    to: str = "saved_model",
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    fold: bool = False,
    batch: str | None = None,
    examples: str | Mapping[str, np.ndarray] | np.ndarray | None = None,
    recalibrate: bool = False,
    pixel_scale: float | None = None,
    description: Mapping[str, Any] | None = None,
    time_limit_secs: float = _TIME_LIMIT_SECS,
) -> Export:
    """Makes a checked model for serving of somebody's training graph.

    Args:
        source: a .meta file, the prefix or directory of a checkpoint that has one, a
            frozen graph, or the directory of a SavedModel; of any library, TensorFlow
            1.4 to 2.21.
        out: the file or, of a SavedModel, directory to write. It must not exist.
        checkpoint: prefix or directory of the checkpoint, where it is not the one that
            belongs to `source`.
        to: "saved_model", "frozen", "tflite" or "onnx".
        inputs: names of tensors that data comes in by, whatever computes them in the
            training graph; by default all placeholders and values of the input pipeline
            that `outputs` need.
        outputs: names of tensors; by default what the graph itself tells, if that is
            one tensor.
        settings: values by name of placeholders that are no inputs, such as keep_prob.
        fold: whether batch norm is folded into the weights before it, where it can be.
        batch: "any" for a batch size of any number, "keep" for that of the graph; by
            default any, where that can be done. "whole": kept, and the batch is one
            example in all, such as the steps of sequences: what is predicted of a part
            may depend on the others.
        examples: arrays by name of an input, a .npz file of them, or one array for
            every input; the first axis is the batch. Random numbers by default.
        recalibrate: whether the statistics are computed anew, over all of `examples`,
            layer by layer.
        pixel_scale: for a model that takes stored pixels: its inputs become uint8, and
            are multiplied by this.
        description: what the .json file beside the model (in the directory of a
            SavedModel: model.json) says, too.
        time_limit_secs: how long a run, and the writing, may each take, in seconds.

    Returns:
        The `Export`.

    Raises:
        ExportError: no model can be made that is surely right: the error names the
            node, and what to do.
        ValueError: a file is missing or damaged, or an argument wrong.
    """
    _check_arguments(out, to, batch)
    if recalibrate and examples is None:
        raise ExportError("`recalibrate` needs `examples` to compute statistics over")
    wishes = Wishes(inputs, outputs, settings or {})
    with Isolated(time_limit_secs) as isolated:  # first: it starts while files are read
        model, given = _prepared(
            open_source(source, checkpoint),
            wishes,
            examples,
            isolated if recalibrate else None,
            pixel_scale,
        )
        unfolded = model.graph if fold else None
        if fold:
            model = _folded(model)
        model, measured = _with_batch(model, unfolded, batch, given, isolated)
        written = write_model(model, out, to, measured, isolated, description)
    checks = (*measured.notes, written)
    return Export(
        out, to, model.inputs, model.outputs, model.changed, model.left, checks
    )


def _prepared(opened, wishes, examples, recalibrating, pixel_scale):
    """The model with its statistics, and what it is checked on."""
    # What is checked on, and computed over, has to fit the inputs: they are known first.
    new: list[NewLayer] = []
    take = _noting_down(new) if recalibrating else take_moving_statistics
    model = prepare(opened, wishes, take)
    if pixel_scale is not None:
        model = with_stored_pixels(model, pixel_scale)
    given = read_examples(examples, model.inputs)
    if new:
        model = with_new_statistics(model, new, given, recalibrating)
    return model, given


def _noting_down(new):
    """`take_new_statistics`, for `prepare`, which asks for names."""

    def take(graph, view, layers):
        new.extend(take_new_statistics(graph, view, layers))
        return [layer.name for layer in new]

    return take


def _check_arguments(out, to, batch):
    for name, value, known in (
        ("to", to, model_formats.FORMATS),
        ("batch", "any" if batch is None else batch, _BATCHES),
    ):
        if value not in known:
            raise ExportError(
                f"`{name}` is {value!r}, but must be one of {', '.join(known)}"
            )
    # Before any work: reading and checking a large graph takes minutes.
    check_new(out)
    model_formats.check_installed(to)


def _folded(model):
    graph = model.graph.copy()  # what folding changed is compared with that before
    _, outputs = model.names()
    folding = fold_layers(graph, outputs)
    extract(graph, outputs)
    count = len(folding.folded)
    kept = len({name for name, _ in folding.left} - set(folding.folded))
    return model._replace(
        graph=graph,
        changed=(*model.changed, f"{count} of {count + kept} layers are folded"),
        left=(*model.left, *(f"{name}: {reason}" for name, reason in folding.left)),
    )


def _with_batch(
    model: Model,
    unfolded: EditableGraph | None,
    batch: str | None,
    examples: Examples,
    isolated: Isolated,
) -> tuple[Model, Measured]:
    """The model with any batch size, where that is wanted and can be done."""
    if batch in (None, "any"):
        changed, names = _with_any_batch(model)
        try:
            return changed, measure(changed, unfolded, examples, isolated)
        except ExportError as error:
            # The sizes that were changed may be others that happen to be the same number.
            if batch == "any" or not names:
                raise
            reason = str(error)
        model = model._replace(
            left=(*model.left, f"the batch size of the graph: {reason}")
        )
    is_whole = batch == "whole"
    return model, measure(model, unfolded, examples, isolated, is_whole=is_whole)


def _with_any_batch(model):
    graph = model.graph.copy()
    inputs, outputs = model.names()
    names = allow_any_batch(graph, inputs, model.batch_size)
    if not names:
        return model, names
    extract(graph, outputs)  # OpenVINO takes what nobody takes for outputs
    changed = f"the batch size is any: {', '.join(names)}"

    def any_first(candidate):
        if not candidate.shape or candidate.shape[0] != model.batch_size:
            return candidate
        return candidate._replace(shape=(None, *candidate.shape[1:]))

    return model._replace(
        graph=graph,
        inputs=tuple(map(any_first, model.inputs)),
        outputs=tuple(map(any_first, model.outputs)),
        changed=(*model.changed, changed),
    ), names


def list_interface(
    source: str,
    *,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """What the graph itself tells of its inputs, labels, outputs and mode, in words."""
    opened = open_source(source)
    interface, mode = interface_of(opened, settings or {})
    lines = [f"mode: {name} = {value}" for name, value in mode.values.items()]
    return "\n".join([*lines, str(interface)])
