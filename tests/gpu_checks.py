"""For people with a GPU: is the library there what it is in float64, and how fast?

    python -m tests.gpu_checks              # a few minutes, on the first GPU
    python -m tests.gpu_checks --dry_run    # the same on the CPU, in small

Prints a line for each check: the largest error as a share of what the roundings of the dtype
may add up to, and how many of the operations were placed on the device. Ends with 0 if all
is well, 1 if something is not, 2 for a wrong command and 3 where TensorFlow sees no GPU.
Nobody has run the library on a GPU yet: what this prints is worth an issue, good or bad.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import ROOT, reference
from tests.benchmarks import layers, peers, timing

NO_GPU = 3
DECAY, EPSILON = 0.9, 1e-3
ON_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")


class Wrong(Exception):
    """What a check found."""


class Case(NamedTuple):
    """A layer, and how it is built.

    Attributes:
        maker: one of `MAKERS`.
        mode: True, False, or a tensor that is fed: "on" or "off".
        masked: whether a mask leaves out one example in four.
    """

    maker: str
    dtype: str = "float32"
    axis: int = -1
    mode: Any = True
    masked: bool = False

    def __str__(self):
        layout = "NHWC" if self.axis == -1 else "NCHW"
        mask = ", masked" if self.masked else ""
        return f"{self.maker} {layout} {self.dtype} is_training={self.mode}{mask}"


def _ours(x, mode, axis, weights, kernel="auto"):
    return bn_tf1.batch_norm(
        x,
        mode,
        axis=axis,
        weights=weights,
        kernel=kernel,
        decay=DECAY,
        epsilon=EPSILON,
        ema_variance="biased" if weights is not None else "unbiased",
    )


def _composed(*arguments):
    return _ours(*arguments, kernel="composed")


def _layers(x, mode, axis, _):
    return bn_tf1.layers.batch_normalization(
        x, axis, momentum=DECAY, epsilon=EPSILON, training=mode
    )


def _slim(x, mode, axis, _):
    return bn_tf1.slim.batch_norm(
        x,
        DECAY,
        scale=True,
        epsilon=EPSILON,
        is_training=mode,
        data_format="NHWC" if axis == -1 else "NCHW",
    )


MAKERS = {
    "batch_norm": _ours,
    "batch_norm(kernel='composed')": _composed,
    "layers.batch_normalization": _layers,
    "slim.batch_norm": _slim,
}
# 1.15 has no kernels for bfloat16; the library composes it in float32.
CASES = [
    *(
        Case("batch_norm", dtype, axis, mode)
        for dtype in ("float32", "float16", "bfloat16")
        for axis in (-1, 1)
        for mode in (True, False, "on", "off")
    ),
    *(
        Case(maker, axis=axis, mode=mode)
        for maker in list(MAKERS)[1:]
        for axis in (-1, 1)
        for mode in (True, "on", "off")
    ),
    *(
        Case("batch_norm", dtype, axis, masked=True)
        for dtype in ("float32", "float16")
        for axis in (-1, 1)
    ),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs all checks, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_checks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="on the CPU, with small tensors"
    )
    is_dry = parser.parse_args(arguments).dry_run
    tf.disable_v2_behavior()
    gpus = tf.config.experimental.list_physical_devices("GPU")
    where = ", ".join(gpu.name for gpu in gpus) or "no GPU"
    print(f"TensorFlow {tf.version.VERSION}, {where}", flush=True)
    if not (gpus or is_dry):
        print(
            "TensorFlow sees no GPU (built for them: "
            f"{tf.test.is_built_with_cuda()}); --dry_run runs the checks on the CPU"
        )
        return NO_GPU
    device = "/cpu:0" if is_dry else "/gpu:0"
    # The scripts first: this process keeps the memory of a GPU that it has taken.
    checks = {"train.py and eval.py": lambda: _check_scripts(is_dry)}
    for case in CASES:
        checks[str(case)] = lambda case=case: _check_layer(case, device, is_dry)
    failures = [name for name, check in checks.items() if not _passes(name, check)]
    for axis in (-1, 1):
        if axis == -1 or not (is_dry and ON_TENSORFLOW_1):
            _print_speed(axis, device, is_dry)
    print(f"{len(checks) - len(failures)} of {len(checks)} checks passed")
    return 1 if failures else 0


def _passes(name, check):
    try:
        print(f"ok      {name}: {check()}", flush=True)
    except (Wrong, tf.errors.OpError, TypeError, ValueError) as problem:
        # What a kernel lacks on a GPU is what this is to find: all the others still run.
        print(f"WRONG   {name}: {type(problem).__name__}: {problem}", flush=True)
        return False
    return True


# ---------------------------------------------------------------------------- numbers


def _check_layer(case, device, is_dry):
    """Output, gradients and statistics of one step against float64."""
    shape = (8, 4, 4, 16) if is_dry else (32, 14, 14, 64)
    if case.axis == 1:
        shape = (shape[0], shape[3], *shape[1:3])
    given = _Given(reference.Case(shape, case.axis), case)
    with tf.Graph().as_default(), tf.device(device), _session() as session:
        x = tf.placeholder(case.dtype, shape)
        mode, feed = case.mode, {x: given.batch.astype(x.dtype.as_numpy_dtype)}
        if isinstance(mode, str):
            mode = tf.placeholder(tf.bool, [])
            feed[mode] = case.mode == "on"
        weights = tf.constant(given.keep, tf.float32) if case.masked else None
        y = MAKERS[case.maker](x, mode, case.axis, weights)
        gamma, beta, *moving = (
            next(v for v in tf.global_variables() if v.op.name.endswith(name))
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        slopes = tf.gradients(y, [x, gamma, beta], tf.constant(given.dy, y.dtype))
        session.run(tf.global_variables_initializer())
        pairs = zip((gamma, beta, *moving), given.variables)
        session.run([tf.assign(variable, value).op for variable, value in pairs])
        metadata = tf.RunMetadata()
        found = session.run(
            [y, *slopes, tf.get_collection(tf.GraphKeys.UPDATE_OPS)],
            feed,
            options=tf.RunOptions(output_partition_graphs=True),
            run_metadata=metadata,
        )[:4]
        found += session.run(moving)
    worst = max(
        _share(what, values, *wanted)
        for values, (what, *wanted) in zip(found, given.expected())
    )
    return f"{worst:.2f} of what roundings allow; {_placed(metadata, device)}"


class _Given:
    """The numbers that a case is fed, and what is right for them."""

    def __init__(self, of: reference.Case, case: Case):
        self.case, self.axis = case, case.axis
        self.trains = case.mode in (True, "on")
        self.batch = reference.make_batch(of, case.dtype)
        self.dy = reference.make_output_gradient(of)
        self.keep = np.arange(of.shape[0]) % 4 != (1 if case.masked else -1)
        # No gradient comes through what is masked, as in a loss that is masked, too.
        self.dy[~self.keep] = 0
        channels = of.shape[self.axis]
        mean = np.linspace(0.5, 1.5, channels).astype(np.float32)
        self.variables = (
            *reference.make_parameters(channels),
            mean,
            mean[::-1] ** 2,
        )

    def expected(self):
        """[(name, value, tolerance)] of y, dx, dgamma, dbeta and the moving statistics."""
        gamma, beta, *moving = (np.float64(v) for v in self.variables)
        kept, dy = self.batch[self.keep], self.dy[self.keep]
        mean, variance, count = reference.moments(kept, self.axis)
        after, unit = moving, 0.0
        if self.trains:
            if not self.case.masked:
                averaged = reference.unbiased(variance, count)
            else:
                averaged = variance
            after = [
                reference.moving_average(old, [new], DECAY)[0]
                for old, new in zip(moving, (mean, averaged))
            ]
            unit = reference.OPERATIONS * reference.ROUNDING["float32"]
            slopes = reference.training_gradients(kept, dy, gamma, self.axis, EPSILON)
        else:
            mean, variance = moving
            slopes = reference.inference_gradients(
                kept, dy, mean, variance, gamma, self.axis, EPSILON
            )
        y = reference.normalize(
            self.batch, mean, variance, gamma, beta, self.axis, EPSILON
        )
        known = mean, variance, gamma, self.axis, EPSILON, self.case.dtype
        allowed = reference.gradient_tolerances(self.batch, self.dy, *known)
        dx = np.zeros_like(self.batch)
        dx[self.keep] = slopes.x
        return [
            ("y", y, reference.output_tolerance(self.batch, y, *known)),
            ("dx", dx, allowed.x),
            ("dgamma", slopes.gamma, allowed.gamma),
            ("dbeta", slopes.beta, allowed.beta),
            ("moving mean", after[0], unit * (1 + np.abs(after[0]))),
            ("moving variance", after[1], unit * (1 + after[1])),
        ]


def _share(what, found, expected, tolerance):
    """The largest error over its tolerance; what may not err at all, did not."""
    errors = np.abs(np.float64(found) - expected)
    if not np.all(errors <= tolerance):  # not a number is no error that is small
        raise Wrong(
            f"{what} is off by {errors.max():.3g}, where {np.min(tolerance):.3g} is the "
            "least that roundings allow"
        )
    return float(np.max(errors / np.maximum(tolerance, 1e-300)))


def _placed(metadata, device):
    """How many operations were placed on the device; raises if most were not."""
    kind = device.strip("/").split(":")[0].upper()
    nodes = [n for graph in metadata.partition_graphs for n in graph.node]
    nodes = [n for n in nodes if not n.name.startswith("_")]
    inside = sum(f"{kind}:" in node.device.upper() for node in nodes)
    if 2 * inside < len(nodes):
        raise Wrong(f"only {inside} of {len(nodes)} operations are on the {kind}")
    return f"{inside} of {len(nodes)} operations on the {kind}"


def _session():
    options = tf.GPUOptions(allow_growth=True)
    return tf.Session(
        config=tf.ConfigProto(allow_soft_placement=True, gpu_options=options)
    )


# ----------------------------------------------------------------------------- scripts


def _check_scripts(is_dry):
    """That a run learns the digits, and is evaluated."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="-1") if is_dry else None
    steps = 40 if is_dry else 200
    with tempfile.TemporaryDirectory() as folder:
        said = ""
        for script in (f"train.py --max_steps={steps}", "eval.py --run_once"):
            name, flag = script.split()
            result = subprocess.run(
                [sys.executable, str(ROOT / name), flag, f"--model_dir={folder}"],
                cwd=str(ROOT),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            said = result.stdout
            if result.returncode:
                raise Wrong(f"{name} ended with {result.returncode}: {said[-2000:]}")
    accuracy = re.search(rf"step {steps}: accuracy ([\d.]+)", said)
    if accuracy is None or float(accuracy.group(1)) < 0.5:
        raise Wrong(f"after {steps} steps eval.py says: {said[-2000:]}")
    return accuracy.group(0)


# ------------------------------------------------------------------------------- speed


def _print_speed(axis, device, is_dry):
    """The time of a layer, forward and backward, against the raw fused kernel."""
    shape = (4, 4, 4, 16) if is_dry else (128, 32, 32, 64)
    if axis == 1:
        shape = (shape[0], shape[3], *shape[1:3])
    contenders = {peers.OURS: peers.ours, "raw kernel": peers.raw_kernel}
    with tf.Graph().as_default(), tf.device(device), _session() as session:
        calls = layers._calls(contenders, session, shape, axis, "forward+backward")
        timings = timing.in_turns(calls, 2 if is_dry else 30, calls=2)
    ours, raw = timing.rows(f"layer forward+backward, axis {axis} of {shape}", timings)
    print(
        f"speed   {ours.case}: {ours.value:.3f} ms, {raw.ratio:.2f} of the raw kernel's "
        f"{raw.value:.3f} ms",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
