"""`lint`: each planted defect is found, and its healthy twin is not accused."""

import contextlib

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.doctor.lint import lint
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.training_nodes import is_gradient
from bn_tf1.graphs.view import view_of
from tests import FIXTURES
from tests.graphs import graph_zoo
from tests.graphs.graph_zoo import (
    convolution,
    images,
    loss_of,
    make_train_op,
    training_graph,
)


def checks(findings=None):
    """The names of the checks with a finding graver than a note."""
    findings = lint(tf.get_default_graph()) if findings is None else findings
    return sorted({f.check for f in findings if f.gravity != "note"})


def finding(check, graph=None):
    """The only finding of `check`, with all its parts filled in."""
    findings = lint(graph or tf.get_default_graph())
    (found,) = [f for f in findings if f.check == check]
    assert all(found._asdict().values())
    for text in (found.what, found.why):
        assert text[0].isupper() or text[0].isdigit(), text
        assert text.endswith("."), text
    assert found.remedy[0].isupper(), found.remedy
    assert len(found.what) + len(found.where) < 600
    return found


@pytest.fixture(params=sorted(graph_zoo.MAKERS))
def maker(request):
    return graph_zoo.MAKERS[request.param]


def test_what_is_no_graph_is_answered_with_where_to_go():
    checkpoint = str(FIXTURES / "contrib" / "model.ckpt")
    with pytest.raises(ValueError, match=r"whose graph is .*model\.ckpt\.meta"):
        lint(checkpoint)
    with pytest.raises(TypeError, match="`path` is <.*Graph.*bn_tf1.lint tells"):
        bn_tf1.audit(tf.get_default_graph())


# --------------------------------------------------------------------------- healthy ones


def test_training_is_healthy(maker):
    training_graph(maker)
    tf.train.Saver()
    assert checks() == []


def test_training_with_a_switch_is_healthy(maker, control_flow):
    if maker.__name__ in ("with_pop_variables", "raw_arithmetic", "textbook"):
        return
    if control_flow == "control_flow_v2":
        tf.enable_resource_variables()
    training_graph(maker, tf.placeholder(tf.bool, [], name="is_training"))
    tf.train.Saver()
    tf.disable_resource_variables()
    assert checks() == []


def test_inference_is_healthy(maker):
    graph_zoo.logits_of(maker(convolution(images()), False))
    tf.train.Saver()
    assert checks() == []


# ------------------------------------------------------------------------- update ops


IN_COLLECTION = [
    name
    for name in sorted(graph_zoo.MAKERS)
    if name not in ("with_ema_class", "with_pop_variables", "contrib_in_place")
]


@pytest.mark.parametrize("name", IN_COLLECTION)
def test_updates_that_no_train_op_runs(name, variable_kind):
    training_graph(graph_zoo.MAKERS[name], updates=[])
    found = finding("update-not-run")
    assert (found.gravity, found.layer) == ("error", "bn")
    assert "moving_mean" in found.what and "tf.get_collection" in found.remedy


def test_updates_in_a_collection_that_nothing_groups():
    training_graph(graph_zoo.ours, updates_collection="my_updates")
    found = finding("update-collection-not-run")
    assert (found.gravity, found.layer) == ("error", "bn")
    assert "tf.get_collection('my_updates')" in found.remedy


def test_updates_in_a_collection_that_the_train_op_runs():
    training_graph_with_collection("my_updates")
    assert checks() == []


def training_graph_with_collection(key):
    y = graph_zoo.ours(convolution(images()), True, updates_collection=key)
    make_train_op(loss_of(y), tf.get_collection(key))


def test_updates_that_only_a_group_apart_runs():
    training_graph(graph_zoo.with_nn, updates=[])
    tf.group(*tf.get_collection(tf.GraphKeys.UPDATE_OPS), name="updates")
    assert finding("update-not-run").gravity == "warning"


def test_a_group_of_train_op_and_updates_runs_them():
    loss = loss_of(graph_zoo.with_nn(convolution(images()), True))
    train_op = make_train_op(loss, [])
    tf.group(train_op, *tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    assert checks() == []


def test_one_layer_of_two_is_named():
    x = convolution(images())
    with tf.variable_scope("first"):
        x = graph_zoo.with_nn(x, True)
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    with tf.variable_scope("second"):
        x = graph_zoo.with_nn(x, True)
    make_train_op(loss_of(x), updates)
    assert finding("update-not-run").layer == "second/bn"


def test_a_layer_without_any_update():
    training_graph(graph_zoo.with_nn, collect=False)
    found = finding("no-update")
    assert (found.gravity, found.certainty, found.layer) == ("error", "certain", "bn")


def test_a_layer_without_moving_statistics():
    with tf.variable_scope("bn"):
        gamma = tf.get_variable("gamma", [graph_zoo.CHANNELS])
        beta = tf.get_variable("beta", [graph_zoo.CHANNELS])
        y, _, _ = tf.nn.fused_batch_norm(convolution(images()), gamma, beta)
    make_train_op(loss_of(y))
    found = finding("no-moving-statistics")
    assert (found.gravity, found.layer) == ("warning", "bn")


# --------------------------------------------------------------------- updates in branches


def in_a_branch(maker, is_training):
    def train():
        return maker(convolution(images()), True)

    def evaluate():
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            return maker(convolution(images()), False)

    return tf.cond(is_training, train, evaluate)


def test_updates_in_a_branch(control_flow):
    tf.enable_resource_variables()
    y = in_a_branch(graph_zoo.with_nn, tf.placeholder(tf.bool, []))
    tf.disable_resource_variables()
    updates = []
    if control_flow == "control_flow_v1":
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    make_train_op(loss_of(y), updates)
    found = finding("update-in-branch")
    assert (found.gravity, found.layer) == ("warning", "bn")


def test_updates_in_place_in_a_branch_are_healthy(control_flow):
    def maker(x, is_training):
        return graph_zoo.ours(x, is_training, update="in_place")

    tf.enable_resource_variables()
    y = in_a_branch(maker, tf.placeholder(tf.bool, []))
    tf.disable_resource_variables()
    make_train_op(loss_of(y))
    assert checks() == []


# --------------------------------------------------------------------------- several calls


def twice(second_updates):
    x = images()
    losses = []
    for reuse, update in ((False, "collection"), (True, second_updates)):
        with tf.variable_scope("net", reuse=reuse):
            y = graph_zoo.ours(convolution(x), True, update=update)
            with tf.variable_scope("", reuse=tf.AUTO_REUSE):
                losses.append(loss_of(y))
        x = x + 1.0
    make_train_op(tf.add_n(losses))


def test_a_layer_that_is_updated_twice_in_a_step():
    twice("collection")
    found = finding("several-updates")
    assert (found.gravity, found.layer) == ("warning", "net/bn")
    assert found.what.startswith("2 operations update net/bn/moving_mean")
    assert "0.9801" in found.what


@pytest.mark.parametrize(
    "calls, decay, gravity",
    [(2, 0.9, "warning"), (12, 0.9, "warning"), (25, 0.9, "error")],
)
def test_updates_that_read_one_old_value_overshoot(calls, decay, gravity):
    """25 of them move it 2.5 times the way to the batch: it grows without bound."""
    for i in range(calls):
        with tf.variable_scope("net", reuse=i > 0):
            y = graph_zoo.with_nn(tf.identity(images()), True, decay=decay)
    make_train_op(tf.reduce_mean(tf.square(y)))
    found = finding("several-updates")
    assert (found.gravity, found.layer) == (gravity, "net/bn")
    reach = calls * (1 - decay)
    told = f"together they move it {reach:.3g} times the way"
    assert (told in found.what) == (reach > 1)


def test_updates_that_follow_one_another_do_not_overshoot():
    updates = []
    for i in range(25):
        with tf.control_dependencies(updates), tf.variable_scope("net", reuse=i > 0):
            y = graph_zoo.with_nn(tf.identity(images()), True, decay=0.9)
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)[-2:]
    make_train_op(tf.reduce_mean(tf.square(y)))
    assert finding("several-updates").gravity == "note"


@pytest.mark.parametrize(
    "options", [{}, {"update": "in_place"}, {"zero_debias": True}, {"kernel": "recipe"}]
)
@pytest.mark.parametrize("by_hand", [True, False])
def test_our_updates_of_many_calls(by_hand, options, variable_kind):
    """By hand they take turns under a lock, which no optimizer does; else in order."""
    ys = []
    for i in range(25):
        with tf.variable_scope("net", reuse=i > 0):
            ys.append(graph_zoo.ours(tf.identity(images()), True, decay=0.9, **options))
    loss, optimizer = tf.reduce_mean(tf.add_n(ys) ** 2), tf.train.AdamOptimizer()
    by_hand = by_hand or "update" in options
    if by_hand:
        make_train_op(loss)
    else:
        bn_tf1.make_train_op(loss, optimizer)
    found = finding("several-updates")
    assert (found.gravity, found.layer) == ("warning" if by_hand else "note", "net/bn")
    said = [check for check in checks() if check != "zero-debias"]
    assert said == ["several-updates"] * by_hand


def test_merged_updates_that_no_train_op_makes(tmp_path):
    """Nothing in UPDATE_OPS could be forgotten: it is found in a .meta file, too."""
    for i in range(2):
        with tf.variable_scope("net", reuse=i > 0):
            y = graph_zoo.ours(convolution(images()), True, update="merged")
    assert tf.get_collection(tf.GraphKeys.UPDATE_OPS) == []
    make_train_op(tf.reduce_mean(tf.square(y)))
    found = finding("merged-update-not-made")
    assert (found.gravity, found.layer) == ("error", "net/bn")
    path = str(tmp_path / "graph.meta")
    tf.train.export_meta_graph(path)
    assert checks(lint(path)) == ["merged-update-not-made"]


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_merged_and_accumulated_updates_are_healthy(
    accumulate_steps, control_flow, variable_kind
):
    if (control_flow, variable_kind) == ("control_flow_v2", "reference_variables"):
        return
    is_training = tf.placeholder(tf.bool, [])
    for update in ("merged", "merged", "collection"):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            name = "other" if update == "collection" else "bn"
            x = convolution(images())
            y = bn_tf1.batch_norm(x, is_training, update=update, name=name)
    loss, optimizer = loss_of(y), tf.train.MomentumOptimizer(0.1, 0.9)
    bn_tf1.make_train_op(loss, optimizer, accumulate_steps=accumulate_steps)
    if accumulate_steps == 1:  # both train ops run one and the same update
        bn_tf1.make_train_op(loss, optimizer)
    tf.train.Saver()
    assert checks() == []
    facts = Facts(view_of(tf.get_default_graph()))
    layers = {a.layer.name: a for a in facts.layers}
    assert sorted(layers) == ["net/bn", "net/other"]
    for layer in layers.values():
        assert layer.layer.moving_mean == layer.layer.name + "/moving_mean"
        run = [u for u in layer.updates if facts.training.runs[u.node]]
        assert (layer.layer.decay, len(run)) == (0.99, 2)


def test_our_updates_of_many_calls_are_no_training():
    for i in range(2):
        with tf.variable_scope("net", reuse=i > 0):
            graph_zoo.ours(tf.identity(images()), True)
    facts = Facts(view_of(tf.get_default_graph()))
    assert not facts.training.applies
    (layer,) = facts.layers
    assert len(layer.updates) == 4


def test_a_layer_that_is_called_twice_and_updated_once():
    twice("skip")
    assert checks() == []


def test_the_first_of_two_towers_updates():
    losses = []
    for i in range(2):
        with tf.variable_scope("net", reuse=i > 0), tf.name_scope(f"tower_{i}"):
            losses.append(loss_of(graph_zoo.with_nn(convolution(images()), True)))
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)[:2]
    make_train_op(tf.add_n(losses), updates)
    assert checks() == []


def test_two_optimizers_that_run_their_own_part():
    with tf.variable_scope("generator"):
        y = graph_zoo.with_nn(convolution(images()), True)
    generator = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    with tf.variable_scope("discriminator"):
        loss = loss_of(graph_zoo.with_nn(convolution(y), True))
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    with tf.control_dependencies(updates[len(generator) :]):
        variables = tf.trainable_variables("discriminator")
        tf.train.AdamOptimizer().minimize(loss, var_list=variables)
    with tf.control_dependencies(generator):
        variables = tf.trainable_variables("generator")
        tf.train.AdamOptimizer(name="G").minimize(-loss, var_list=variables)
    assert checks() == []


# -------------------------------------------------------------------------------- the mode


def test_batch_statistics_for_good_in_an_inference_graph(maker):
    graph_zoo.logits_of(maker(convolution(images()), True))
    found = finding("training-mode-in-inference")
    assert (found.gravity, found.layer) == ("error", "bn")


def generator(is_training):
    """Of images, with a transposed convolution before a batch norm and one behind it."""
    x = images()
    for i, size in enumerate((10, 20)):
        with tf.variable_scope(f"up{i}"):
            weights = tf.get_variable("w", [5, 5, 4, int(x.shape[-1])])
            x = tf.nn.conv2d_transpose(x, weights, [8, size, size, 4], [1, 2, 2, 1])
            x = tf.nn.relu(graph_zoo.with_nn(x, is_training))
    return x


def test_batch_statistics_for_good_behind_a_transposed_convolution():
    generator(True)
    found = [f for f in lint(tf.get_default_graph()) if f.gravity == "error"]
    assert [f[:4] for f in found] == [
        ("training-mode-in-inference", "error", "likely", f"up{i}/bn") for i in (0, 1)
    ]
    assert "python -m bn_tf1 export" in found[0].remedy


def test_a_transposed_convolution_is_no_gradient_and_its_gradient_is_one():
    y = generator(False)
    assert not Facts(view_of(tf.get_default_graph())).has_gradients
    weights = tf.trainable_variables()[0]
    tf.gradients(y, weights, name="other_name")
    assert Facts(view_of(tf.get_default_graph())).has_gradients


def test_a_convolution_of_gradients_is_a_gradient_whatever_its_name():
    x = images()
    y = tf.nn.relu(convolution(convolution(x), name="second"))
    found = tf.gradients(tf.reduce_sum(y), x, name="other_name")
    view = view_of(tf.get_default_graph())
    node = view.find(found[0].op.name)
    assert view.ops[node] == "Conv2DBackpropInput"
    assert is_gradient(view, node)


def test_a_switch_in_an_inference_graph_is_healthy(control_flow):
    default = tf.placeholder_with_default(False, [], name="is_training")
    graph_zoo.logits_of(graph_zoo.with_fused_kernel(convolution(images()), default))
    assert checks() == []


def test_moving_statistics_for_good_in_a_training_graph(maker):
    training_graph(maker, False)
    found = finding("inference-mode-in-training")
    assert (found.gravity, found.layer) == ("warning", "bn")


def test_a_frozen_layer_is_healthy():
    training_graph(graph_zoo.ours, False, trainable=False)
    assert checks() == []


def small_images(batch, size):
    return tf.placeholder(tf.float32, [batch, size, size, 4], name="images")


@pytest.mark.parametrize("name", ["with_nn", "with_fused_kernel", "textbook"])
def test_one_value_per_channel(name):
    y = graph_zoo.MAKERS[name](tf.identity(small_images(1, 1)), True)
    make_train_op(loss_of(y))
    found = finding("one-value-per-channel")
    assert (found.gravity, found.layer) == ("error", "bn")
    assert "[1, 1, 1, 4]" in found.what


@pytest.mark.parametrize("batch, size", [(2, 1), (1, 2), (None, 1)])
def test_several_values_per_channel(batch, size):
    y = graph_zoo.with_fused_kernel(small_images(batch, size), True)
    make_train_op(loss_of(y))
    assert checks() == []


# ---------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.99995, 1.0])
def test_unusual_decays(decay):
    training_graph(graph_zoo.with_nn, decay=decay)
    found = finding("unusual-decay")
    assert (found.layer, found.what.split(";")[0]) == ("bn", f"The decay is {decay:g}")


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.997, 0.999, 0.9997, 0.9999])
def test_usual_decays(decay):
    training_graph(graph_zoo.with_nn, decay=decay)
    assert checks() == []


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 0.1, 1.0])
def test_unusual_epsilons(epsilon):
    training_graph(graph_zoo.with_nn, epsilon=epsilon)
    found = finding("unusual-epsilon")
    assert (found.layer, found.what.split(";")[0]) == ("bn", f"Epsilon is {epsilon:g}")


@pytest.mark.parametrize("epsilon", [1e-6, 1.001e-5, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", ["with_nn", "with_fused_kernel"])
def test_usual_epsilons(epsilon, name):
    training_graph(graph_zoo.MAKERS[name], epsilon=epsilon)
    assert checks() == []


def test_a_saver_of_the_trainable_variables(maker):
    training_graph(maker)
    tf.train.Saver(tf.trainable_variables())
    found = finding("statistics-not-saved")
    assert (found.gravity, found.layer) == ("error", "bn")
    assert found.where.count(",") == 1


def test_a_second_saver_saves_the_statistics():
    training_graph(graph_zoo.with_nn)
    tf.train.Saver(tf.trainable_variables())
    tf.train.Saver()
    assert checks() == []


def test_zero_debias(variable_kind):
    training_graph(graph_zoo.with_nn, zero_debias=True)
    found = finding("zero-debias")
    assert found.layer == "bn" and "moving_mean/biased" in found.where
    assert found.gravity == "warning"
    assert checks() == ["zero-debias"]


@pytest.mark.parametrize("without", ["", "biased", "local_step"])
def test_zero_debias_is_a_note_where_all_its_variables_are_saved(without):
    training_graph(graph_zoo.with_nn, zero_debias=True)
    variables = tf.global_variables()
    tf.train.Saver([v for v in variables if not without or without not in v.op.name])
    assert finding("zero-debias").gravity == ("warning" if without else "note")


def trained_statistics(trainable=True):
    """A layer by hand that normalises with its moving statistics, as variables do."""
    with tf.variable_scope("bn"):
        gamma, beta, mean, variance = graph_zoo._variables(graph_zoo.CHANNELS)
    for variable in (mean, variance):
        if trainable:
            tf.add_to_collection(tf.GraphKeys.TRAINABLE_VARIABLES, variable)
    return tf.nn.batch_normalization(
        convolution(images()), mean, variance, beta, gamma, 1e-3
    )


def test_statistics_that_an_optimizer_trains(variable_kind):
    make_train_op(loss_of(trained_statistics()))
    found = finding("statistics-trained")
    assert found[:4] == ("statistics-trained", "error", "certain", "bn")
    assert "bn/moving_mean, bn/moving_variance" in found.what


@pytest.mark.parametrize("as_file", [False, True])
def test_statistics_among_the_trainable_variables(as_file, tmp_path, variable_kind):
    loss = loss_of(trained_statistics())
    weights = [v for v in tf.trainable_variables() if "moving" not in v.op.name]
    tf.train.AdamOptimizer().minimize(loss, var_list=weights)
    graph = tf.get_default_graph()
    if as_file:
        graph = str(tmp_path / "graph.meta")
        tf.train.export_meta_graph(graph)
    found = finding("statistics-trained", graph)
    assert found[:4] == ("statistics-trained", "warning", "likely", "bn")


def test_statistics_that_are_not_trained(variable_kind):
    make_train_op(loss_of(trained_statistics(trainable=False)))
    assert not [f for f in lint(tf.get_default_graph()) if "trained" in f.check]


# ------------------------------------------------------------------- import and freezing


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/model.ckpt.meta")), ids=str)
def test_graphs_of_1_15_that_tensorflow_2_does_not_import(path):
    found = [f for f in lint(str(path)) if f.check == "stored-shapes"]
    assert [f.gravity for f in found] == ["note"] * len(found)
    # Those two have no such gradient outside of a function.
    assert bool(found) == (path.parent.name not in ("tensorpack", "while_v2"))
    if not graph_zoo.IS_1:
        with contextlib.ExitStack() as stack:
            stack.enter_context(tf.Graph().as_default())
            if found:
                stack.enter_context(pytest.raises(ValueError, match="_output_shapes"))
            tf.train.import_meta_graph(str(path))


def frozen(y):
    """The graph of `y` with constants for variables, and why its import fails, if so."""
    y = tf.identity(y, name="y")
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        graph_def = tf.graph_util.convert_variables_to_constants(
            session, y.graph.as_graph_def(), ["y"]
        )
    feed = {"images:0": np.zeros([8, 5, 5, 3])}
    if any(node.name == "is_training" for node in graph_def.node):
        feed["is_training:0"] = True
    try:
        with tf.Graph().as_default(), tf.Session() as session:
            tf.import_graph_def(tf.GraphDef.FromString(graph_def.SerializeToString()))
            session.run("import/y:0", {f"import/{k}": v for k, v in feed.items()})
    except (ValueError, tf.errors.OpError) as error:
        return graph_def, error
    return graph_def, None


@pytest.mark.parametrize("is_training", [True, "fed"])
@pytest.mark.parametrize("name", ["ours", "in_place", "with_nn", "with_ema_class"])
def test_a_frozen_graph_is_broken_where_its_import_fails(
    name, is_training, control_flow, variable_kind
):
    if control_flow == "control_flow_v2":
        tf.enable_resource_variables()  # 1.15 cannot do otherwise
    if is_training == "fed":
        is_training = tf.placeholder(tf.bool, [], name="is_training")
    options = {"update": "in_place"} if name == "in_place" else {}
    maker = graph_zoo.MAKERS["ours" if name == "in_place" else name]
    graph_def, error = frozen(maker(convolution(images()), is_training, **options))
    found = [f for f in lint(graph_def) if f.check == "broken-freeze"]
    assert bool(found) == (error is not None), error
    assert all(f[:3] == ("broken-freeze", "error", "certain") for f in found)


def test_weight_decay_on_gamma_and_beta(maker, variable_kind):
    loss = loss_of(maker(convolution(images()), True))
    loss += sum(1e-4 * tf.nn.l2_loss(v) for v in tf.trainable_variables())
    make_train_op(loss)
    found = finding("weight-decay")
    assert (found.gravity, found.certainty, found.layer) == ("warning", "certain", "bn")


@pytest.mark.parametrize("on_all", [True, False])
def test_a_penalty_on_absolute_values(on_all, variable_kind):
    loss = loss_of(graph_zoo.with_nn(convolution(images()), True))
    weights = tf.trainable_variables()
    weights = weights if on_all else [v for v in weights if "bn/" not in v.op.name]
    make_train_op(loss + sum(1e-4 * tf.reduce_sum(tf.abs(v)) for v in weights))
    assert checks() == (["weight-decay"] if on_all else [])


def test_weight_decay_on_the_other_weights(maker):
    loss = loss_of(maker(convolution(images()), True))
    weights = [v for v in tf.trainable_variables() if "bn/" not in v.op.name]
    make_train_op(loss + sum(1e-4 * tf.nn.l2_loss(v) for v in weights))
    assert checks() == []


def test_a_bias_just_before():
    bias = tf.get_variable("bias", [graph_zoo.CHANNELS])
    for add in (tf.nn.bias_add, tf.add):
        with tf.variable_scope(add.__name__):
            graph_zoo.with_nn(add(convolution(images()), bias), False)
    found = [f for f in lint(tf.get_default_graph()) if f.gravity == "note"]
    assert [f.check for f in found] == ["bias-before-batch-norm"] * 2
    assert [f.where for f in found] == ["bias"] * 2


def test_no_bias_before(maker):
    maker(convolution(images()) + tf.placeholder(tf.float32, [8, 5, 5, 1]), False)
    assert not [f for f in lint(tf.get_default_graph()) if "bias" in f.check]
