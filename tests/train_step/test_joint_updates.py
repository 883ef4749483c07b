"""`update="merged"`: one update by all calls of a layer, as by the batch of all of them."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

DECAY = 0.8
RANDOM = np.random.RandomState(0)
# 30 batches of 2 to 9 examples, each with a mean and a deviation of its own.
BATCHES = [
    RANDOM.normal(k / 3, 1 + k / 9, [2 + 5 * k % 8, 4, 3, 5]).astype(np.float32)
    for k in range(30)
]
TOLERANCE = 1e-6


def own(x, **options):
    return bn_tf1.batch_norm(x, True, decay=DECAY, name="bn", **options)


LAYERS = {
    "batch_norm": own,
    "unbiased": lambda x, **options: own(x, ema_variance="unbiased", **options),
    "zero_debias": lambda x, **options: own(x, zero_debias=True, **options),
    "renorm": lambda x, **options: own(
        x, renorm=bn_tf1.Renormalization(DECAY, dmax=1.0), **options
    ),
    "ghosts": lambda x, **options: own(x, ghost_batch_size=1, **options),
    "layers": lambda x, **options: bn_tf1.layers.batch_normalization(
        x, momentum=DECAY, name="bn", training=True, **options
    ),
    "slim": lambda x, **options: bn_tf1.slim.batch_norm(
        x, DECAY, scope="bn", **options
    ),
}


def train_op_of(ys, **options):
    loss = tf.add_n([tf.reduce_sum(tf.square(y - 1.0)) for y in ys])
    return bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.0), **options)


def assert_moving(session, variable, mean, variance):
    for role, expected in (("moving_mean", mean), ("moving_variance", variance)):
        values = session.run(variable(f"bn/{role}"))
        np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=1e-7)


def expected_after(batches, steps=1, name="batch_norm"):
    """The moving statistics after updates by all values together, in float64."""
    mean, variance, count = reference.moments(np.concatenate(batches))
    if name in ("unbiased", "layers", "slim"):
        variance = variance * count / (count - 1)
    if name == "ghosts":
        examples = np.concatenate(batches).astype(np.float64)
        variance = examples.var(axis=(1, 2)).mean(axis=0)
    kept = 0.0 if name == "zero_debias" else DECAY**steps
    if name == "renorm":  # what is averaged is the deviation, from sqrt(1) on
        deviation = kept + (1 - kept) * np.sqrt(variance + 1e-3)
        return (1 - kept) * mean, deviation**2 - 1e-3
    return (1 - kept) * mean, kept + (1 - kept) * variance


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_thirty_calls_are_one_batch(name, start, variable):
    ys = [
        LAYERS[name](tf.constant(batch), reuse=k > 0 or None, update="merged")
        for k, batch in enumerate(BATCHES)
    ]
    train_op = train_op_of(ys)
    session = start()
    for steps in (1, 2):
        session.run(train_op)
        expected = expected_after(BATCHES, steps, name)
        assert_moving(session, variable, *expected)


def test_calls_count_by_what_they_have(start, variable, control_flow, variable_kind):
    """A mask, an empty batch, one in inference mode, one that is not finite, a list."""
    batches = [batch[:2] for batch in BATCHES[:7]]
    weights = np.float32([0.5, 2.0])
    x = [tf.placeholder(tf.float32, [None, 4, 3, 5]) for _ in batches]
    modes = [tf.placeholder_with_default(True, []) for _ in batches]
    asked = [{} for _ in batches]
    asked[0] = {"weights": tf.constant(weights)}
    layer = {"decay": DECAY, "name": "bn", "reuse": tf.AUTO_REUSE, "update": "merged"}
    inputs = [*x[:5], x[5:]]
    ys = [
        bn_tf1.batch_norm(*call, **options, **layer)
        for *call, options in zip(inputs, modes, asked)
    ]
    train_op = train_op_of([*ys[:5], *ys[5]])
    session = start()
    feeds = dict(zip(x, [*batches[:2], batches[2][:0], *batches[3:]]))
    feeds[modes[3]] = False
    feeds[x[4]] = np.full_like(batches[4], np.nan)
    session.run(train_op, feeds)
    one, *others = (batches[i].astype(np.float64) for i in (0, 1, 5, 6))
    share = np.repeat(weights, 12) / (30.0 + 3 * 24)
    rows = one.reshape([24, 5])
    others = np.concatenate(others).reshape([-1, 5])
    mean = share @ rows + others.sum(0) / 102
    variance = share @ (rows - mean) ** 2 + ((others - mean) ** 2).sum(0) / 102
    expected = (1 - DECAY) * mean, DECAY + (1 - DECAY) * variance
    assert_moving(session, variable, *expected)
    session.run(train_op, {**feeds, **dict.fromkeys(modes, False)})
    assert_moving(session, variable, *expected)  # no call counts: as they were


class Others:
    """In the place of workers: another batch, which each call has besides its own."""

    def joint_moments(self, moments):
        mean, variance, count = reference.moments(BATCHES[9])
        other = [tf.constant(float(count)), *map(tf.to_float, (mean, variance))]
        return bn_tf1.statistics.joint_of(
            [
                moments,
                moments._replace(count=other[0], mean=other[1], variance=other[2]),
            ]
        )


def test_with_joint_statistics_of_workers(start, variable):
    """Each call counts with the batches of all workers."""
    for k in range(3):
        reuse = k > 0 or None
        y = own(tf.constant(BATCHES[k]), reuse=reuse, update="merged", sync=Others())
    session = start()
    session.run(train_op_of([y]))
    batches = [*BATCHES[:3], *[BATCHES[9]] * 3]
    assert_moving(session, variable, *expected_after(batches))


def test_beside_other_policies_and_ignored(start, variable):
    """Merged calls make one update, others one each; a layer may be left to others."""
    policies = ["merged", "skip", "collection", "merged"]
    ys = [
        own(tf.constant(batch), reuse=k > 0 or None, update=update)
        for k, (batch, update) in enumerate(zip(BATCHES, policies))
    ]
    updates = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    assert len(updates) == 2
    left = train_op_of(ys, ignored_layers=["bn"], update_ops=[])
    both = train_op_of(ys)
    session = start()
    session.run(left)
    assert_moving(session, variable, 0.0, 1.0)
    session.run(both)
    mean, variance = expected_after([BATCHES[0], BATCHES[3]])
    alone = reference.moments(BATCHES[2])
    assert_moving(
        session,
        variable,
        DECAY * mean + (1 - DECAY) * alone.mean,
        DECAY * variance + (1 - DECAY) * alone.variance,
    )


@pytest.mark.parametrize("name", ["batch_norm", "layers", "slim"])
def test_refused_inside_of_control_flow(name):
    x = tf.constant(BATCHES[0])
    with pytest.raises(ValueError, match='`update` is "merged", but the layer .*bn'):
        tf.cond(
            tf.placeholder(tf.bool, []),
            lambda: LAYERS[name](x, update="merged"),
            lambda: x,
        )


def test_refused_where_calls_cannot_make_one_update():
    x = tf.constant(BATCHES[0])
    y = bn_tf1.batch_norm(x, True, decay=0.9, name="bn", update="merged")
    again = {"name": "bn", "reuse": True, "update": "merged"}
    other = bn_tf1.batch_norm(x, True, decay=0.8, **again)
    with pytest.raises(
        ValueError, match="`decay` is 0.9 in one of them and 0.8 in ano"
    ):
        train_op_of([y, other])
    with pytest.raises(ValueError, match="the recipe cannot have `update` = 'merged'"):
        bn_tf1.batch_norm(x, True, kernel="recipe", update="merged")
    with pytest.raises(
        ValueError, match="`update` is 'merged', but must be 'collectio"
    ):
        bn_tf1.slim.batch_norm(x, updates_collections=None, update="merged")


def test_a_call_after_the_train_op_would_be_left_out():
    x = tf.constant(BATCHES[0])
    train_op_of([own(x, update="merged")])
    own(x, reuse=True, update="skip")
    with pytest.raises(
        ValueError, match="'bn' already, and this one would be left out"
    ):
        own(x, reuse=True, update="merged")


def test_two_train_ops_of_a_step_make_one_update(start, variable):
    """What is in the collection runs once in a step, whoever asks for it."""
    ys = [
        own(tf.constant(batch), reuse=k > 0 or None, update="collection")
        for k, batch in enumerate(BATCHES[:2])
    ]
    both = [train_op_of(ys), train_op_of(ys)]
    session = start()
    session.run(both)
    mean, variance = 0.0, 1.0
    for batch in BATCHES[:2]:
        moments = reference.moments(batch)
        mean = DECAY * mean + (1 - DECAY) * moments.mean
        variance = DECAY * variance + (1 - DECAY) * moments.variance
    assert_moving(session, variable, mean, variance)
