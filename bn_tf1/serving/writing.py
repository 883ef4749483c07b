"""Writes a model in its format, beside its place first, and reads it back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile

from bn_tf1.graphs.rewriting.editable_graph import canonical
from bn_tf1.serving.checking import TOLERANCE, Measured, compare
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.isolated_run import Isolated
from bn_tf1.serving.preparing import Model

DESCRIPTION = "model.json"


def check_new(path: str) -> None:
    """Raises ExportError unless something can be made at `path`."""
    if os.path.lexists(path):
        raise ExportError(f"{path} exists, and nothing is written over")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ExportError(f"{path}: there is no directory {folder}")


def write_model(
    model: Model,
    path: str,
    kind: str,
    measured: Measured,
    isolated: Isolated,
    more: dict | None = None,
) -> str:
    """Writes `model` to `path`, once what was written gives the outputs it should.

    Args:
        model: the model.
        path: a new file, or directory for a SavedModel.
        kind: see `model_formats`.
        measured: what the model gives.
        isolated: writes and reads it.
        more: what else the description beside the model says.

    Returns:
        What was checked, a sentence.

    Raises:
        ExportError: it cannot be written, or is not what it should be; nothing is left.
    """
    folder = os.path.dirname(os.path.abspath(path))
    # Beside its place: a rename within a file system is done as a whole, or not at all.
    try:
        place = tempfile.mkdtemp(prefix=os.path.basename(path) + ".part-", dir=folder)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    try:
        made = os.path.join(place, os.path.basename(path.rstrip("/")))
        apart = _written(model, made, kind, measured, isolated)
        description = _description(model, kind, more or {})
        check_new(path)  # again: the checks may have taken minutes
        # The description first: a model that is there has one.
        if os.path.isdir(made):
            _write_json(os.path.join(made, DESCRIPTION), description)
        else:
            _write_json(made + ".json", description)
            os.replace(made + ".json", path + ".json")
        os.rename(made, path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return f"what was written gives these outputs, to {apart:.1e} of their scale"


def _written(model, made, kind, measured, isolated):
    inputs, outputs = model.names()
    isolated.write(
        kind,
        model.graph,
        made,
        inputs=inputs,
        outputs=outputs,
        shapes=[list(c.shape) if c.shape is not None else None for c in model.inputs],
        input_keys=list(zip(_keys(model, inputs), inputs)),
        output_keys=list(zip(_keys(model, outputs), outputs)),
    )
    (ran,) = isolated.run(made, [measured.feed], outputs, kind=kind)
    what = f"the outputs of the {kind} model and those that it should have"
    return compare(zip(outputs, ran, measured.outputs), TOLERANCE, what)


def _keys(model, names):
    """The names in the signature: the source's, or without scopes where that is clear."""
    # Whoever called the source by them goes on to do so.
    known = [model.keys.get(name) for name in names]
    if None not in known:
        return known
    leaves = [name.rpartition("/")[2] for name in names]
    if len(set(leaves)) == len(leaves):
        return leaves
    return [name.replace("/", "_") for name in names]


def _description(model, kind, more):
    return dict(
        more,
        format=kind,
        inputs=[_described(c) for c in model.inputs],
        outputs=[_described(c) for c in model.outputs],
        changed=list(model.changed),
        left=list(model.left),
    )


def _described(candidate):
    return {
        "tensor": canonical(candidate.tensor) + ":0",
        "dtype": candidate.dtype.name if candidate.dtype is not None else None,
        "shape": candidate.shape,
    }


def _write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
