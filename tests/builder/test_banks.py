"""Banks: several sets of statistics in one layer, of which a call takes one."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

BANKS = 3
DECAY = 0.75
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # some operations of float32 on values of size 1
LEAVES = ["moving_mean", "moving_variance"]


def name_of(bank, leaf):
    return f"bn/bank_{bank}/{leaf}" if bank else f"bn/{leaf}"


def names_of_all(leaves=tuple(LEAVES)):
    return [name_of(bank, leaf) for bank in range(BANKS) for leaf in leaves]


def batch(seed, shape=(6, 3)):
    rng = np.random.RandomState(seed)
    return rng.normal(1 + seed, 1 + seed, size=shape).astype(np.float32)


def ours(x, is_training, **options):
    return bn_tf1.batch_norm(x, is_training, name="bn", **{"decay": DECAY, **options})


def slim(x, is_training, **options):
    how = {"decay": DECAY, "fused": False, "scope": "bn", **options}
    return bn_tf1.slim.batch_norm(x, is_training=is_training, **how)


def tf_layers(x, is_training, **options):
    how = {"momentum": DECAY, "fused": False, "name": "bn", **options}
    return bn_tf1.layers.batch_normalization(x, training=is_training, **how)


@pytest.fixture
def values(session, variable):
    """values(names) are those of variables now."""
    return lambda names: dict(zip(names, session.run([variable(n) for n in names])))


@pytest.mark.parametrize(
    "layer, options",
    [
        (ours, {}),
        (ours, {"update": "in_place"}),
        (ours, {"kernel": "composed"}),
        (ours, {"decay": "cumulative"}),
        (ours, {"weights": None}),
        (ours, {"ghost_batch_size": 3}),
        (ours, {"renorm": bn_tf1.Renormalization()}),
        (ours, {"zero_debias": True}),
        (ours, {"shape": [2, 3, 4, 3], "kernel": "fused"}),
        (slim, {}),
        (slim, {"updates_collections": None}),
        (slim, {"fused": True, "shape": [2, 3, 4, 3]}),
        (tf_layers, {}),
        (tf_layers, {"fused": True, "shape": [2, 3, 4, 3]}),
    ],
    # Not by str: the address of a function differs between the processes of a test run.
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "plain",
)
def test_a_tensor_takes_one_bank_and_leaves_the_others_bit_for_bit(
    layer, options, start, values, graph
):
    """Each bank is then what a layer of its own has, which sees its batches alone."""
    options = dict(options)
    shape = options.pop("shape", [6, 3])
    if "weights" in options:
        options["weights"] = tf.ones([6])
    x = tf.placeholder(tf.float32, [None, *shape[1:]])
    bank, is_training = tf.placeholder(tf.int64, []), tf.placeholder(tf.bool, [])
    with tf.variable_scope("banked"):
        y = layer(x, is_training, bank=bank, banks=BANKS, **options)
    alone = []
    for i in range(BANKS):
        with tf.variable_scope(f"alone_{i}"):
            alone.append(layer(x, is_training, **options))
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    of = {
        i: [op for op in updates if op.name.startswith(f"alone_{i}/")]
        for i in range(BANKS)
    }
    banked = [op for op in updates if op.name.startswith("banked/")]
    session = start()
    everything = [v.op.name for v in tf.global_variables() if "banked" in v.op.name]
    steps = [(1, True), (0, True), (1, True), (1, False), (2, True), (0, False)]
    for step, (i, mode) in enumerate(steps):
        feed = {x: batch(step, shape), bank: i, is_training: mode}
        before = values(everything)
        found, _ = session.run([y, banked], feed)
        expected, _ = session.run([alone[i], of[i]], feed)
        np.testing.assert_allclose(found, expected, **CLOSE)
        for name, value in values(everything).items():
            other = name.replace("banked", f"alone_{i}").replace(f"bank_{i}/", "")
            is_own = (f"/bank_{i}/" in name) if i else "/bank_" not in name
            if is_own:
                expected = values([other])[other]
                np.testing.assert_allclose(value, expected, **CLOSE, err_msg=name)
            else:
                np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_calls_with_numbers_against_float64(start, values, graph):
    """Clean and adversarial examples: one gamma and beta, two sets of statistics."""
    inputs = [tf.placeholder(tf.float32, [None, 3]) for _ in range(2)]
    outputs = [
        ours(x, True, bank=i, banks=2, reuse=tf.AUTO_REUSE)
        for i, x in enumerate(inputs)
    ]
    loss = tf.add_n([tf.reduce_mean(y**3) for y in outputs])
    train_op = bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.0))
    assert {v.op.name for v in tf.trainable_variables()} == {"bn/gamma", "bn/beta"}
    session = start()
    found, _ = session.run([outputs, train_op], dict(zip(inputs, map(batch, (0, 1)))))
    for i in range(2):
        moments = reference.moments(batch(i), -1)
        expected = [0.25 * moments.mean, 0.75 + 0.25 * moments.variance]
        names = [name_of(i, leaf) for leaf in LEAVES]
        for value, wanted in zip(values(names).values(), expected):
            np.testing.assert_allclose(value, wanted, **CLOSE)
        wanted = reference.training_output(batch(i), axis=-1)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="never update .*'bn/bank_1'"):
        updates = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)[:2]
        optimizer = tf.train.GradientDescentOptimizer(0.0)
        bn_tf1.make_train_op(loss, optimizer, update_ops=updates)


def test_merged_calls_count_for_the_banks_that_they_choose(start, values):
    inputs = [tf.placeholder(tf.float32, [None, 3]) for _ in range(2)]
    chosen = [tf.placeholder(tf.int32, []) for _ in range(2)]
    outputs = [
        ours(x, True, bank=i, banks=2, update="merged", reuse=tf.AUTO_REUSE)
        for x, i in zip(inputs, chosen)
    ]
    loss = tf.add_n([tf.reduce_mean(y**3) for y in outputs])
    train_op = bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.0))
    session = start()
    data = batch(0), batch(1, (4, 3))
    names, mean = ["bn/moving_mean", "bn/bank_1/moving_mean"], np.zeros([2, 3])
    for banks in ([1, 1], [0, 1]):
        feed = {**dict(zip(inputs, data)), **dict(zip(chosen, banks))}
        session.run(train_op, feed)
        for i in set(banks):
            own = np.concatenate([d for d, j in zip(data, banks) if i == j])
            mean[i] = DECAY * mean[i] + (1 - DECAY) * own.astype(np.float64).mean(0)
        for found, expected in zip(values(names).values(), mean):
            np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("bank", [1, "tensor"])
def test_each_bank_has_a_gamma_and_a_beta_if_it_shall(bank, start, values, session):
    x = tf.placeholder(tf.float32, [None, 3])
    if bank == "tensor":
        bank = tf.constant(1)
    y = ours(x, True, bank=bank, banks=BANKS, bank_affine=True)
    names = names_of_all(["gamma", "beta"])
    assert sorted(v.op.name for v in tf.trainable_variables()) == sorted(names)
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    train_op = bn_tf1.make_train_op(tf.reduce_sum(y**3 + y), optimizer)
    start()
    before = values(names)
    session.run(train_op, {x: batch(0)})
    expected = reference.training_output(batch(0), axis=-1)
    slope = 3 * expected**2 + 1
    wanted = {
        "bn/bank_1/gamma": 1 - 0.1 * (slope * expected).sum(0),
        "bn/bank_1/beta": -0.1 * slope.sum(0),
    }
    for name, value in values(names).items():
        # Sums of six float32 products of size 1 to 10.
        np.testing.assert_allclose(
            value, wanted.get(name, before[name]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("fold", [False, True])
def test_inference_and_folding(fold, start, variable, session):
    x = tf.placeholder(tf.float32, [None, 4])
    bank = tf.placeholder(tf.int32, [])
    weights = tf.constant(batch(0, (4, 3)))
    y = ours(tf.matmul(x, weights), False, bank=bank, banks=BANKS, fold=fold)
    start()
    for number, name in enumerate(names_of_all(["moving_mean"])):
        variable(name).load(np.full(3, number, np.float32), session)
    product = batch(1, (5, 4)).astype(np.float64) @ batch(0, (4, 3))
    for number in range(BANKS):
        found = session.run(y, {x: batch(1, (5, 4)), bank: number})
        np.testing.assert_allclose(
            found, (product - number) / np.sqrt(1 + 1e-3), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("number", [-1, BANKS])
def test_a_tensor_out_of_range_ends_the_run(number, is_training, start, values):
    x, bank = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.int32, [])
    y = ours(x, is_training, bank=bank, banks=BANKS, update="in_place")
    session = start()
    before = values(names_of_all())
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"bn.* must lie in \[0, 3\)"
    ):
        session.run(y, {x: batch(0), bank: number})
    for name, value in values(names_of_all()).items():
        np.testing.assert_array_equal(value, before[name])


def test_in_a_loop_each_iteration_takes_its_bank(start, values):
    x = tf.constant(batch(0))
    body = lambda i, h: (
        i + 1,
        h
        + 0
        * ours(h, True, bank=i, banks=BANKS, update="in_place", reuse=tf.AUTO_REUSE),
    )
    ours(x, False, bank=0, banks=BANKS)
    _, h = tf.while_loop(lambda i, _: i < 2, body, [0, x], parallel_iterations=1)
    start().run(h)
    found = values(names_of_all(["moving_mean"]))
    expected = 0.25 * batch(0).astype(np.float64).mean(0)
    for bank, value in enumerate(found.values()):
        np.testing.assert_allclose(value, expected * (bank < 2), **CLOSE)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bank": 3, "banks": 3}, ["`bank` is 3", "[0, 3)"]),
        ({"bank": -1, "banks": 3}, ["`bank` is -1", "[0, 3)"]),
        ({"bank": 0}, ["`banks` is None"]),
        ({"banks": 2}, ["`bank` is None", "[0, 2)"]),
        ({"bank_affine": True}, ["`banks` is None"]),
        ({"bank": 0, "banks": 0}, ["`banks` is 0"]),
        ({"bank": True, "banks": 2}, ["`bank` is True"]),
        ({"bank": "float", "banks": 2}, ["`bank` is", "scalar int tensor"]),
        ({"bank": 0, "banks": 2, "kernel": "recipe"}, ["recipe", "`banks` = 2"]),
        ({"bank": "int", "banks": 2, "sync": "workers"}, ["`sync`", "call for each"]),
        ({"bank": "int", "banks": 2, "fold": "once"}, ["'once'", "fold=True"]),
    ],
    ids=str,
)
def test_what_is_refused(options, words):
    class Workers:
        def joint_moments(self, moments):
            return moments

    given = dict(options)
    if isinstance(given.get("bank"), str):
        given["bank"] = tf.constant(
            1, {"int": tf.int32, "float": tf.float32}[given["bank"]]
        )
    if "sync" in given:
        given["sync"] = Workers()
    is_training = "fold" not in given
    x = tf.matmul(tf.ones([4, 2]), tf.ones([2, 3]))
    with pytest.raises(ValueError) as error:
        bn_tf1.batch_norm(x, is_training, **given)
    assert all(word in str(error.value) for word in words), error.value
