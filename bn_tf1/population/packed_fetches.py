"""Many small tensors fetched as few: a session spends more on each than the layer does.

Vectors are concatenated and scalars stacked, those of one dtype together; what is neither
is fetched by itself, and so is everything of a finalized graph.
"""

from __future__ import annotations

from typing import Any, Iterable, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.population.probes import made_once


class PackedFetches:
    """What to fetch for `tensors`.

    Attributes:
        fetches: the tensors to fetch.
    """

    def __init__(self, tensors: Iterable[tf.Tensor]):
        tensors = {tensor.name: tensor for tensor in tensors}
        groups: dict[Any, list[tf.Tensor]] = {}
        for name, tensor in tensors.items():
            is_packed = tensor.shape.ndims in (0, 1) and tensor.shape.is_fully_defined()
            if tensor.graph.finalized or not is_packed:
                groups[name] = [tensor]
            else:
                key = tensor.dtype.base_dtype, tensor.shape.ndims
                groups.setdefault(key, []).append(tensor)
        self.fetches = [_packed(group) for group in groups.values()]
        # By the name of a tensor: the number of the fetch, and its place there.
        self._places: dict[str, tuple[int, Any]] = {}
        for number, group in enumerate(groups.values()):
            start = 0
            for tensor in group:
                place: Any = slice(start, start + (tensor.shape.num_elements() or 0))
                if tensor.shape.ndims == 0:
                    place = start
                self._places[tensor.name] = number, place if len(group) > 1 else ...
                start += tensor.shape.num_elements() or 0

    def by_name(self, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The value of each tensor, from those of `fetches`."""
        values = [np.asarray(value) for value in values]
        return {name: values[i][place] for name, (i, place) in self._places.items()}


def _packed(group):
    if len(group) == 1:
        return group[0]
    join = tf.stack if group[0].shape.ndims == 0 else lambda g: tf.concat(g, 0)
    key = ("packed", *(tensor.name for tensor in group))
    return made_once(group[0].graph, key, lambda: join(group))
