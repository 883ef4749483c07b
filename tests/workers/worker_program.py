"""One worker of a small training run, for test_cluster: python -m ... FOLDER FAULT.

Two layers, one of them behind a switch, over batches of unequal sizes and an empty one.
Writes the variables to FOLDER/<index>.npz. A process without TF_CONFIG trains on the whole
batches. Worker 1 has the fault.
"""

import os
import signal
import sys

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1

# Examples of each step by worker; the second has none in the last step.
PARTS = ([3, 5], [1, 6], [4, 0])
CHANNELS = 5


def batch(step):
    """(inputs, targets, weights) of all workers' examples in a step."""
    random = np.random.RandomState(step)
    count = sum(PARTS[step])
    inputs, targets = random.randn(2, count, 4, 3, CHANNELS) * 2 + 3
    return inputs, targets, random.rand(count)


def build(workers):
    """(train op, feeds, global variables that are wanted)."""
    x = tf.placeholder(tf.float64, [None, 4, 3, CHANNELS])
    target = tf.placeholder(tf.float64, x.shape)
    weights = tf.placeholder(tf.float64, [None])
    is_training = tf.placeholder_with_default(True, [])
    factor = tf.get_variable("factor", initializer=np.linspace(1, 2, CHANNELS))
    sync = None if workers.size == 1 else workers
    y = bn_tf1.batch_norm(x * factor, is_training, sync=sync, name="first")
    y = bn_tf1.batch_norm(
        tf.tanh(y) * factor, True, sync=sync, weights=weights, name="second"
    )
    errors = tf.reduce_sum((y - target) ** 2 * np.arange(1, 6), [1, 2, 3])
    train_op = bn_tf1.make_train_op(
        tf.reduce_mean(errors),
        tf.train.MomentumOptimizer(0.01, 0.9),
        clip_norm=5.0,
        workers=workers,
        num_examples=tf.shape(x)[0],
        penalty=tf.reduce_sum(factor**2) / 10,
    )
    return train_op, (x, target, weights)


def train(workers, fault=""):
    """The variables by name after all steps."""
    workers.join()
    train_op, feeds = build(workers)
    variables = tf.global_variables()
    share = workers.share(variables)
    alone = workers.total(tf.ones([1]))
    with workers.session() as session:
        session.run(tf.global_variables_initializer())
        if not workers.is_chief:
            session.run([v.assign(v + 1) for v in variables])
        session.run(share)
        for step, parts in enumerate(PARTS):
            first = sum(parts[: workers.index])
            own = slice(first, first + parts[workers.index])
            if workers.size == 1:
                own = slice(None)
            session.run(train_op, dict(zip(feeds, (p[own] for p in batch(step)))))
            if workers.is_chief:
                session.run(variables)  # reaches no collective
        if workers.index == 1:
            if fault == "alone":
                session.run(alone)
            elif fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if fault:
            session.run(train_op, dict(zip(feeds, (p[:0] for p in batch(0)))))
        return {v.op.name: session.run(v) for v in variables}


if __name__ == "__main__":
    tf.disable_v2_behavior()
    cluster = bn_tf1.Workers.from_environment(silence_secs=20.0, step_secs=40.0)
    values = train(cluster, sys.argv[2])
    path = os.path.join(sys.argv[1], f"{cluster.index}.npz")
    np.savez(path, **{name.replace("/", "|"): v for name, v in values.items()})
