"""How far the compiled operation is from float64, beside the recipe.

Contract: each output and each gradient may be as far off as the recipe's, or by 1e-7 of its
largest value (a unit of the last place, where the input is float16 or bfloat16), where that
is more. The oracle is float64 NumPy.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.compiled.kernel import normalize_batch
from bn_tf1.statistics import plan_of

_EPSILON = 1e-3
_UNITS = {tf.float32: 1e-7, tf.bfloat16: 2.0**-8, tf.float16: 2.0**-11}
_NAMES = ("y", "mean", "variance", "dx", "dgamma", "dbeta", "dresidual")
# Shape, channel axis, dtype, mean in deviations. Each way that the operation goes through a
# tensor is there, with rows that are full and rows that are not.
_CASES = (
    ((64, 9, 9, 16), 3, tf.float32, 0.0),
    ((64, 9, 9, 16), 3, tf.float32, 300.0),
    ((1000, 33), 1, tf.float32, 300.0),
    ((16, 8, 33, 31), 1, tf.float32, 300.0),
    ((2, 3, 1500), 1, tf.float32, 0.0),
    ((20000, 2, 2), 1, tf.float32, 1.0),
    ((33001, 67), 1, tf.float32, 0.0),
    ((64, 9, 9, 16), 3, tf.bfloat16, 0.0),
    ((64, 9, 9, 16), 3, tf.float16, 0.0),
)


class Distance(NamedTuple):
    """The largest errors of one tensor, as shares of its largest value.

    Attributes:
        case: dtype, shape, channel axis and mean of what was normalised.
        name: of the output or gradient.
        ours, recipes: the largest errors.
        limit: the largest error that ours may have.
    """

    case: str
    name: str
    ours: float
    recipes: float
    limit: float

    @property
    def is_good(self) -> bool:
        """Whether the error is within its limit."""
        return self.ours <= self.limit

    def __str__(self) -> str:
        verdict = "good" if self.is_good else "TOO FAR OFF"
        return (
            f"{self.case}: {self.name} is off by {self.ours:.1e}, the recipe by "
            f"{self.recipes:.1e}: {verdict}"
        )


def measure() -> Iterator[Distance]:
    """The errors of each output and gradient, case by case."""
    for number, (shape, axis, dtype, mean) in enumerate(_CASES):
        # A seed for each case: what is found in one does not depend on those before it.
        random = np.random.RandomState(number)
        values = [random.normal(size=shape) for _ in range(3)]
        values[0] += mean
        # Rounded before the oracle sees them: it is not to be blamed for their digits.
        x, dy, residual = (v.astype(dtype.as_numpy_dtype) for v in values)
        gamma, beta = random.normal(size=(2, shape[axis])).astype(np.float32)
        given = x, dy, residual, gamma, beta
        expected = oracle(*given, axis, _EPSILON)
        found = [_by_tensorflow(f, given, axis) for f in (_compiled, _recipe)]
        case = f"{dtype.name} {list(shape)}, axis {axis}, mean {mean:g}"
        for name, *tensors, exact in zip(_NAMES, *found, expected):
            scale = np.max(np.abs(exact))
            errors = [
                np.max(np.abs(t.astype(np.float64) - exact)) / scale for t in tensors
            ]
            # Statistics and gradients of parameters are float32 whatever the input is.
            unit = _UNITS[dtype] if name in ("y", "dx", "dresidual") else 1e-7
            yield Distance(case, name, *errors, max(errors[1], unit))


def oracle(x, dy, residual, gamma, beta, axis, epsilon):
    """In float64: y, mean, biased variance, dx, dgamma, dbeta, dresidual, with relu."""
    x, dy, residual, gamma, beta = (
        np.moveaxis(v.astype(np.float64), axis, -1) if v.ndim > 1 else v.astype(float)
        for v in (x, dy, residual, gamma, beta)
    )
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    centred = x - mean
    variance = np.square(centred).mean(axes)
    deviation = np.sqrt(variance + epsilon)
    z = gamma * centred / deviation + beta + residual
    direct = np.where(z > 0, dy, 0)
    dbeta = direct.sum(axes)
    dgamma = (direct * centred / deviation).sum(axes)
    count = x.size / x.shape[-1]
    through = dbeta / count + dgamma / count * centred / deviation
    dx = gamma / deviation * (direct - through)
    y, dx, direct = (np.moveaxis(v, -1, axis) for v in (np.maximum(z, 0), dx, direct))
    return y, mean, variance, dx, dgamma, dbeta, direct


def _by_tensorflow(function, given, axis):
    with tf.Graph().as_default(), tf.Session() as session:
        x, dy, residual, gamma, beta = map(tf.constant, given)
        y, mean, variance = function(x, residual, gamma, beta, axis)
        slopes = tf.gradients(y, [x, gamma, beta, residual], dy)
        return session.run([y, mean, variance, *slopes])


def _compiled(x, residual, gamma, beta, axis):
    plan = plan_of(x, (axis,), epsilon=_EPSILON, kernel="compiled")
    how = {"activation": "relu", "residual": residual}
    return normalize_batch(
        x, gamma, beta, plan, epsilon=_EPSILON, unbiased=False, **how
    )[:3]


def _recipe(x, residual, gamma, beta, axis):
    # Not the page of recipe.py, which has variables: they would hide the gradients here.
    wide = tf.cast(x, tf.float32)
    axes = [a for a in range(x.shape.ndims) if a != axis]
    mean, variance = tf.nn.moments(wide, axes, keep_dims=True)
    gamma, beta = (tf.reshape(v, mean.shape) for v in (gamma, beta))
    y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, _EPSILON)
    y = tf.nn.relu(tf.cast(y, x.dtype) + residual)
    return y, tf.reshape(mean, [-1]), tf.reshape(variance, [-1])
