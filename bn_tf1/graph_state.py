"""What the library remembers of a graph, as long as it lives.

Contract: no checkpoint and no exported graph has it: `export_meta_graph` writes only the
collections whose key is a string.
"""

from __future__ import annotations

from typing import Any, Callable

import tensorflow.compat.v1 as tf


def graph_state(name: str, make: Callable[[], Any]) -> Any:
    """What was made under `name` for the default graph; now, if it was not yet."""
    found = tf.get_collection_ref(("bn_tf1_" + name,))
    if not found:
        found.append(make())
    return found[0]
