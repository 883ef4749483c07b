"""The formats of exported models: writing them, and running them by their own runtime.

    frozen         GraphDef                            TensorFlow
    saved_model    directory                           TensorFlow
    tflite         made from the frozen graph          ai-edge-litert or TensorFlow
    onnx           made from it by tf2onnx             onnxruntime

Default attributes are stripped, so that TensorFlow 1.15 reads what 2.21 wrote.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import first_line

FORMATS = ("saved_model", "frozen", "tflite", "onnx")
_EXTRAS = {"onnx": ("tf2onnx", "onnxruntime")}
_ONNX_OPSET = 13


def check_installed(kind: str) -> None:
    """Raises ValueError where a package that `kind` needs is not installed."""
    # Looked for, and not imported: that is for the process that runs them.
    missing = [
        package
        for package in _EXTRAS.get(kind, ())
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ValueError(
            f"`--to {kind}` needs {' and '.join(missing)}: pip install 'bn_tf1[{kind}]'"
        )


def explained(step: Mapping[str, Any], error: Exception) -> str:
    """What a step failed with, in one line."""
    doing = "written" if step["do"] == "write" else "run"
    text = first_line(error)
    if text == "See console for info.":  # the converter of 1.15, before its reason
        told = re.search(r"^\w*(?:Exception|Error): (.+)", str(error), re.MULTILINE)
        text = told.group(1) if told is not None else text
    text = text[:500]
    return f"the {step['kind']} model cannot be {doing}: {type(error).__name__}: {text}"


# -------------------------------------------------------------------------------- write


def write(step: Mapping[str, Any]) -> None:
    """Writes the graph of a step in its format; see `Isolated.write`."""
    graph_def = _read(step["graph"])
    writer = {
        "frozen": _write_frozen,
        "saved_model": _write_saved_model,
        "tflite": _write_tflite,
        "onnx": _write_onnx,
    }[step["kind"]]
    writer(graph_def, step)


def _read(path):
    with open(path, "rb") as file:
        return tf.GraphDef.FromString(file.read())


def _write_frozen(graph_def, step):
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        # There is no other public way to leave out the default attributes.
        meta = tf.train.export_meta_graph(graph=graph, strip_default_attrs=True)
    with open(step["path"], "wb") as file:
        file.write(meta.graph_def.SerializeToString())


def _write_saved_model(graph_def, step):
    # Of constants: with local variables, initialised or not, the v1 loader, TFLite and
    # OpenVINO cannot read one.
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        signature = tf.saved_model.predict_signature_def(
            *(
                {key: graph.get_tensor_by_name(f"{name}:0") for key, name in pairs}
                for pairs in (step["input_keys"], step["output_keys"])
            )
        )
        builder = tf.saved_model.Builder(step["path"])
        with tf.Session() as session:
            builder.add_meta_graph_and_variables(
                session,
                [tf.saved_model.tag_constants.SERVING],
                {"serving_default": signature},
                strip_default_attrs=True,
            )
        builder.save()


def _write_tflite(graph_def, step):
    del graph_def  # the converter reads the file
    # TFLite wants whole numbers; its interpreter resizes the first to any batch.
    shapes = {
        name: [1 if size is None else size for size in shape]
        for name, shape in zip(step["inputs"], step["shapes"])
    }
    converter = tf.lite.TFLiteConverter.from_frozen_graph(
        step["graph"], step["inputs"], step["outputs"], input_shapes=shapes
    )
    with open(step["path"], "wb") as file:
        file.write(converter.convert())


def _write_onnx(graph_def, step):
    convert = importlib.import_module("tf2onnx.convert")
    convert.from_graph_def(
        graph_def,
        input_names=[f"{name}:0" for name in step["inputs"]],
        output_names=[f"{name}:0" for name in step["outputs"]],
        opset=_ONNX_OPSET,
        output_path=step["path"],
    )


# ---------------------------------------------------------------------------------- run


def run(
    step: Mapping[str, Any], feeds: Sequence[Mapping[str, np.ndarray]]
) -> Iterable[list[np.ndarray]]:
    """The outputs of a model for each of `feeds`; see `Isolated.run`."""
    runner = {
        "frozen": _run_tensorflow,
        "saved_model": _run_tensorflow,
        "tflite": _run_tflite,
        "onnx": _run_onnx,
    }[step["kind"]]
    return runner(step, feeds)


def _run_tensorflow(step, feeds):
    config = tf.ConfigProto()
    rewriting = config.graph_options.rewrite_options
    rewriting.disable_meta_optimizer = step.get("as_written", False)
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        if step["kind"] == "frozen":
            tf.import_graph_def(_read(step.get("graph") or step["path"]), name="")
        else:
            tags = [tf.saved_model.tag_constants.SERVING]
            tf.saved_model.loader.load(session, tags, step["path"])
        names = [f"{name}:0" for name in step["outputs"]]
        for feed in feeds:
            values = {f"{name}:0": value for name, value in feed.items()}
            yield session.run(names, values)


def _interpreter_class():
    # TensorFlow's own, which 2.21 deprecates, gives the same numbers.
    if importlib.util.find_spec("ai_edge_litert") is not None:
        return importlib.import_module("ai_edge_litert.interpreter").Interpreter
    return tf.lite.Interpreter


def _run_tflite(step, feeds):
    interpreter = _interpreter_class()(model_path=step["path"])
    details = interpreter.get_input_details()
    by_name = {re.sub(r":0$", "", d["name"]): d for d in details}
    for feed in feeds:
        for name, value in feed.items():
            detail = by_name[name]
            if list(detail["shape"]) != list(value.shape):
                interpreter.resize_tensor_input(detail["index"], list(value.shape))
        interpreter.allocate_tensors()
        for name, value in feed.items():
            interpreter.set_tensor(by_name[name]["index"], value)
        interpreter.invoke()
        # In the order in which they were asked for; names may differ by version.
        yield [
            interpreter.get_tensor(detail["index"]).copy()
            for detail in interpreter.get_output_details()
        ]


def _run_onnx(step, feeds):
    runtime = importlib.import_module("onnxruntime")
    # Named: a build for GPUs refuses a session that names no provider.
    session = runtime.InferenceSession(step["path"], providers=["CPUExecutionProvider"])
    names = [f"{name}:0" for name in step["outputs"]]
    for feed in feeds:
        yield session.run(names, {f"{name}:0": v for name, v in feed.items()})
