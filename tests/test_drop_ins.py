"""The drop-ins against the originals, call by call, over every option and rank.

The cases are in `drop_in_cases.py`. What the originals gave is in
`fixtures/drop_ins/`; on TensorFlow 1.15 some of them are asked again.

Both compute in float32, in different orders: a few roundings of values of size 1 to 10,
which a gradient's sum over the batch multiplies by ten. In float16 the original rounds
every step to 11 bits.
"""

import json
import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1.layers
import bn_tf1.slim
from tests import drop_in_cases
from tests.fixtures.make_drop_ins import FOLDER, signature

ON_TF1 = tf.version.VERSION.startswith("1.")
TOLERANCES = {"float16": 2e-2, "float32": 2e-5, "float64": 2e-6}
ORIGINS = {
    "layers": (
        bn_tf1.layers,
        drop_in_cases.LAYERS_CASES,
        drop_in_cases.layers_once,
    ),
    "slim": (bn_tf1.slim, drop_in_cases.SLIM_CASES, drop_in_cases.slim_once),
}
CASES = [
    pytest.param(name, key, id=f"{name}-{key}")
    for name, (_, cases, _) in ORIGINS.items()
    for key in cases
]


def load(name):
    """The recorded texts of `layers` or `slim`, and the numbers by case and by what."""
    with np.load(os.path.join(FOLDER, name + ".npz")) as file:
        texts, values = json.loads(str(file["texts"])), file["values"]
    numbers, start = {}, 0
    for key, of_case in texts.items():
        if key == "signatures":
            continue
        numbers[key] = {}
        for what, shape in of_case.pop("numbers"):
            end = start + int(np.prod(shape))
            numbers[key][what] = values[start:end].reshape(shape)
            start = end
    return texts, numbers


RECORDED = {name: load(name) for name in ORIGINS}


def named(texts):
    """`texts` without the name of an output that is a reshape or an identity: it only
    tells how many of these the original made before."""
    output = texts.get("output", "")
    made = ("/batchnorm/add_1", "/batchnorm_1/add_1", "/FusedBatchNormV3")
    if output.endswith(made):
        return texts
    return {key: text for key, text in texts.items() if key != "output"}


def assert_like_the_recording(seen, name, key, dtype):
    texts, numbers = RECORDED[name]
    expected, actual = named(texts[key]), json.loads(json.dumps(seen.texts))
    assert {what: actual[what] for what in expected} == expected
    assert list(seen.numbers) == list(numbers[key])
    tolerance = TOLERANCES[dtype]
    for what, expected in numbers[key].items():
        np.testing.assert_allclose(
            seen.numbers[what], expected, rtol=tolerance, atol=tolerance, err_msg=what
        )


@pytest.mark.parametrize("name, key", CASES)
def test_what_the_original_gave(name, key):
    origin, cases, once = ORIGINS[name]
    seen = drop_in_cases.record(cases[key], origin, once)
    assert_like_the_recording(seen, name, key, cases[key].dtype)


@pytest.mark.parametrize(
    "name, function",
    [
        ("layers", "batch_normalization"),
        ("layers", "BatchNormalization"),
        ("slim", "batch_norm"),
    ],
)
def test_signatures_and_defaults(name, function):
    ours = signature(getattr(ORIGINS[name][0], function))
    # What the originals have no such thing for can only be given by name.
    ours = [argument for argument in ours if argument[1] != "KEYWORD_ONLY"]
    texts, _ = RECORDED[name]
    assert json.loads(json.dumps(ours)) == texts["signatures"][function]


@pytest.mark.skipif(not ON_TF1, reason="TensorFlow 2 has no original")
@pytest.mark.parametrize("name, key", CASES[::8])
def test_the_recording_is_what_the_original_gives(name, key):
    import tensorflow

    original = tf.layers if name == "layers" else tensorflow.contrib.layers
    _, cases, once = ORIGINS[name]
    seen = drop_in_cases.record(cases[key], original, once)
    assert_like_the_recording(seen, name, key, cases[key].dtype)
