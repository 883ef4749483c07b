"""Lets a function take the arguments that an `arg_scope` gives to a library's original.

    with slim.arg_scope([slim.batch_norm], is_training=False):
        y = bn_tf1.slim.batch_norm(x)  # is_training is False

Who changes the calls and forgets a key would otherwise stay in training mode, which is
the default of slim, and nobody would say so.

Contract: the scopes of tf_slim and of `tf.contrib.framework`, if the program has imported
them. What a call gives itself goes before what a scope gives, as in the libraries.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable

# Which module has the scopes, and which the batch norm.
_LIBRARIES = (
    ("tf_slim", "tf_slim"),
    ("tensorflow.contrib.framework", "tensorflow.contrib.layers"),
)


def obeys_arg_scopes(function: Callable) -> Callable:
    """`function` with the arguments that scopes of the originals give as its defaults."""

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**_scoped_arguments(), **kwargs})

    return scoped


def _scoped_arguments():
    found: dict = {}
    # Not imported here: a scope can only have been opened by who has the library.
    for scopes, layers in _LIBRARIES:
        if scopes in sys.modules and layers in sys.modules:
            original = sys.modules[layers].batch_norm
            # What `arg_scope_func_key` gives, which contrib does not show.
            key = getattr(original, "_key_op", str(original))
            found.update(sys.modules[scopes].current_arg_scope().get(key, {}))
    return found
