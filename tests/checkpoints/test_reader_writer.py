"""What TensorFlow's errors are told as: the reason alone, in one line."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import first_line

REASON = "folder/part-0; File too large"
MESSAGES = {
    "plain": REASON + "\n\t [[node save/SaveV2 (defined at x.py:1)]]",
    "with a traceback": "Graph execution error:\n\nDetected at node save\n"
    "Node: 'save/SaveV2'\n" + REASON,
    "of a server": "From /job:worker/replica:0/task:0:\n" + REASON + "\n\t [[node]]",
    "of a server, with a traceback": "Graph execution error:\n\nDetected at node save\n"
    "Node: 'save/SaveV2'\nFrom /job:worker/replica:0/task:0:\n" + REASON,
}


@pytest.mark.parametrize("name", list(MESSAGES))
def test_the_reason_stands_alone(name):
    error = tf.errors.OutOfRangeError(None, None, MESSAGES[name])
    assert first_line(error) == REASON
    assert first_line(ValueError(MESSAGES[name])) == REASON
