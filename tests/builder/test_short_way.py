"""The way through the core is short: what a stranger steps through to build one layer."""

import os
import sys

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1

IS_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")
PACKAGE = os.path.dirname(bn_tf1.__file__) + os.sep


def calls_of(build):
    """The calls into the library that `build()` makes: (file, function, depth) of each."""
    calls, depth = [], 0

    def trace(frame, event, _):
        nonlocal depth
        code = frame.f_code
        is_ours = code.co_filename.startswith(PACKAGE)
        if event not in ("call", "return") or not is_ours or code.co_name[0] == "<":
            return
        depth += 1 if event == "call" else -1
        if event == "call":
            calls.append((code.co_filename, code.co_name, depth))

    sys.setprofile(trace)
    try:
        build()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "shape, kernel, mode, most_calls, most_functions",
    [
        ((64, 32, 32, 64), "fused", True, 70, 40),
        # TensorFlow 1.15 sees it as an image, and makes sums of sums.
        ((8, 8, 8, 64), "composed", True, 100, 60 if IS_TENSORFLOW_1 else 50),
        ((64, 32, 32, 64), "fused", "tensor", 95, 50),
    ],
    ids=["fused", "composed", "tensor"],
)
def test_calls_of_a_layer(shape, kernel, mode, most_calls, most_functions):
    """With the kernels that TensorFlow 2 takes by itself."""
    x = tf.placeholder(tf.float32, shape)
    mode = tf.placeholder(tf.bool, []) if mode == "tensor" else mode
    bn_tf1.batch_norm(x, mode, kernel=kernel)
    calls = calls_of(lambda: bn_tf1.batch_norm(x, mode, kernel=kernel))
    assert 20 < len(calls) <= most_calls
    assert len({call[:2] for call in calls}) <= most_functions


def test_files_and_depth_of_a_fused_layer():
    x = tf.placeholder(tf.float32, (64, 32, 32, 64))
    bn_tf1.batch_norm(x, True, kernel="fused")
    calls = calls_of(lambda: bn_tf1.batch_norm(x, True, kernel="fused"))
    files = [call[0] for call in calls]
    assert len(set(files)) <= 8
    assert sum(one != other for one, other in zip(files, files[1:])) <= 35
    assert max(call[2] for call in calls) <= 9
