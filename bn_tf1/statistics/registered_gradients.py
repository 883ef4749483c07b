"""Gradients by hand, known to TensorFlow by a name.

`tf.custom_gradient` is not used because its gradient finds the tensors of the graph that
it was built in, and not those of the copy that a function or a branch of control flow v2
becomes: TensorFlow 1.15 fails there. A gradient that is registered finds everything in
its operation.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import tensorflow.compat.v1 as tf


@functools.lru_cache(maxsize=None)
def registered_gradient(name: str, gradient: Callable, **settings: Any) -> str:
    """The name, for `gradient_override_map`, of `gradient` with these settings.

    Args:
        name: unique within this library; graph files hold it, with the settings.
        gradient: called with an operation, the gradients of its outputs and `settings`;
            returns those of its inputs.
        settings: hashable; their `repr` tells them apart.
    """
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    full_name = f"bn_tf1.{name}({arguments})"
    try:
        tf.RegisterGradient(full_name)(functools.partial(gradient, **settings))
    except KeyError:
        pass  # this library was loaded before, and TensorFlow remembers it
    return full_name
