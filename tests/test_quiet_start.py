"""The quiet start, in processes of their own: what is seen, and what is given back."""

import os
import re
import subprocess
import sys

import pytest

from bn_tf1 import quiet_start
from tests import ROOT

PROBE = """
import os, sys
IMPORTS_TENSORFLOW_ITSELF = True
from bn_tf1 import quiet_start

with quiet_start.importing(verbose=sys.argv[1] == "verbose"):
    assert "tensorflow" not in sys.modules
    os.write(2, b"from C++\\n")
    print("from Python", file=sys.stderr)
    if sys.argv[1] == "fails":
        raise ImportError("no such library")
    if sys.argv[1] == "aborts":
        os.abort()
    import tensorflow.compat.v1 as tf
print("afterwards", file=sys.stderr)
if sys.argv[1] != "verbose":
    tf.disable_v2_behavior()
    with tf.Session() as session:
        session.run(tf.constant(1.0))
"""


def _errors(case):
    return subprocess.run(
        [sys.executable, "-c", PROBE, case],
        cwd=str(ROOT),
        # What the level of the tests' own set-up would show.
        env={k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_nothing_is_seen_of_an_import_that_works_nor_of_the_first_session():
    result = _errors("works")
    assert result.returncode == 0
    assert result.stderr == "afterwards\n"


def test_verbose_shows_everything():
    assert "from C++\nfrom Python\n" in _errors("verbose").stderr


def test_an_error_gives_back_what_was_held():
    result = _errors("fails")
    assert result.stderr.startswith("from C++\nfrom Python\nTraceback")
    assert "ImportError: no such library" in result.stderr


def test_an_import_that_kills_the_process_is_not_silent():
    result = _errors("aborts")
    assert result.returncode < 0
    assert "Fatal Python error: Aborted" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["train.py"], False), (["train.py", "--verbose"], True), (["-verbose"], True)],
)
def test_verbose_is_read_off_the_command_line(arguments, expected):
    assert quiet_start.is_verbose(arguments) is expected


def test_a_python_without_tensorflow_is_told_in_one_sentence():
    """As a fresh Python has neither that nor absl, which is imported before it."""
    for script in ("train.py", "eval.py", "-m"):
        arguments = [
            script,
            *(["bn_tf1", "doctor", "README.md"] if script == "-m" else []),
        ]
        result = subprocess.run(
            # Without what was installed beside it.
            [sys.executable, "-S", "-E", *arguments],
            cwd=str(ROOT),
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert re.match("there is no (absl|tensorflow) in this Python, /.*: use", line)
