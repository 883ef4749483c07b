"""Every check of the doctor, once: what it finds, how grave that is, why, and the cure.

    python -m bn_tf1 doctor --list
    python -m bn_tf1 doctor --explain never-updated

Contract: a finding is made by `found_by` alone, from the entry of its check; a module that
checks adds what it measured, and no advice of its own. So what the terminal, the page,
the table in the README and `--explain` say of a check is one text. Names stay: scripts
select by them.
"""

from __future__ import annotations

import string
from typing import Any, NamedTuple

from bn_tf1.doctor.findings import CERTAINTIES, Finding

_ALL_VARIABLES = "saver = tf.train.Saver(tf.global_variables())"
_STARTS_ANEW = (
    "tf.train.latest_checkpoint returns None, and a run that is started again begins at "
    "step 0 without a word, over the checkpoints that are there."
)
_NEVER_UPDATED = (
    "Moving statistics that are never updated keep their initial values, a mean of 0 and "
    "a variance of 1. Training looks healthy, and evaluation is far worse."
)
_RECALIBRATE = (
    "For this checkpoint: python -m bn_tf1 recalibrate {source} computes the statistics "
    "of its weights over data."
)
_EXPORT = (
    "Make an inference graph of the training graph: python -m bn_tf1 export "
    "TRAINING.meta OUT --checkpoint CHECKPOINT."
)
_WRITE_STATE = "tf.train.update_checkpoint_state({directory!r}, {checkpoint!r})"
_ANEW = (
    "python -m bn_tf1 convert {path} NEW --from slim --to slim (or the library that "
    "made it)"
)


class Check(NamedTuple):
    """One check.

    Attributes:
        name: in kebab case, stable across versions.
        looks_at: "graph", "checkpoint" or "training directory".
        gravities: those that its findings can have, the gravest first.
        what: what it finds, in one sentence.
        why: why that matters.
        remedy: how to mend it, with the line of code or the command. Names in braces
            are filled in by what was found.
    """

    name: str
    looks_at: str
    gravities: tuple[str, ...]
    what: str
    why: str
    remedy: str


def found_by(
    check: str,
    certainty: str,
    where: str,
    what: str,
    *,
    layer: str = "",
    gravity: str | None = None,
    **details: Any,
) -> Finding:
    """A finding of `check`.

    Args:
        check: the name of a check of the register.
        certainty: "certain", "likely" or "possible".
        where: the file, node or variable.
        what: what is wrong, with the figures.
        layer: the scope of the layer; "" for none.
        gravity: one of those of the check; may be left out where it has only one.
        **details: what its remedy has in braces.

    Raises:
        KeyError: there is no such check, or a detail of its remedy is not given.
        ValueError: the check has no such gravity, or several and none is given.
    """
    entry = BY_NAME[check]
    # Several joined are none of them: whoever leaves it out is told which there are.
    gravity = gravity or " or ".join(entry.gravities)
    if gravity not in entry.gravities or certainty not in CERTAINTIES:
        raise ValueError(
            f"{check} is found with gravity {gravity!r} and certainty {certainty!r}, but "
            f"must be one of {entry.gravities} and one of {CERTAINTIES}"
        )
    remedy = entry.remedy.format(**details)
    return Finding(check, gravity, certainty, layer, where, what, entry.why, remedy)


def general_remedy(check: Check) -> str:
    """The remedy with PLACEHOLDERS where a finding has a name."""
    # As str.format reads it: doubled braces are a text's own.
    pieces = string.Formatter().parse(check.remedy)
    return "".join(text + (name or "").upper() for text, name, _, _ in pieces)


def by_place() -> dict[str, list[Check]]:
    """The checks by what they look at, in the order of the register."""
    places: dict[str, list[Check]] = {}
    for check in CHECKS:
        places.setdefault(check.looks_at, []).append(check)
    return places


CHECKS = (
    # ------------------------------------------------------------------------- a graph
    Check(
        "update-not-run",
        "graph",
        ("error", "warning"),
        "No train op runs the updates of the moving statistics.",
        _NEVER_UPDATED,
        "Make the train op wait for them: with tf.control_dependencies({updates}): "
        "train_op = optimizer.minimize(loss). Or train_op = bn_tf1.make_train_op(loss, "
        "optimizer). Nothing is to be done if the program fetches them in every step by "
        "itself.",
    ),
    Check(
        "update-collection-not-run",
        "graph",
        ("error", "warning"),
        "The updates are in a collection of their own, and no train op runs it.",
        _NEVER_UPDATED,
        "Make the train op wait for them: with tf.control_dependencies({updates}): "
        "train_op = optimizer.minimize(loss). Nothing is to be done if the program "
        "fetches them in every step by itself.",
    ),
    Check(
        "no-update",
        "graph",
        ("error",),
        "A layer is trained with batch statistics, and nothing updates its moving ones.",
        _NEVER_UPDATED,
        "Use a layer whose updates are part of the graph, with the same variables: "
        "y = bn_tf1.batch_norm(x, is_training, name={name!r})",
    ),
    Check(
        "merged-update-not-made",
        "graph",
        ("error",),
        'A layer has update="merged", and no train op was made that merges its calls.',
        _NEVER_UPDATED,
        "Make the train op with train_op = bn_tf1.make_train_op(loss, optimizer), after "
        "the last call of the layer. For a train op of your own: bn_tf1.batch_norm(x, "
        'is_training, update="collection").',
    ),
    Check(
        "no-moving-statistics",
        "graph",
        ("warning",),
        "A layer normalises with batch statistics and has no moving ones.",
        "Evaluation must use batch statistics too: a prediction depends on the other "
        "examples of its batch, and one example alone cannot be normalised.",
        "Keep moving statistics: y = bn_tf1.batch_norm(x, is_training). A trained network "
        "gets them from python -m bn_tf1 recalibrate GRAPH.meta NEW --checkpoint "
        "CHECKPOINT --examples X.npz.",
    ),
    Check(
        "update-in-branch",
        "graph",
        ("warning",),
        "An update is inside of a condition or loop that does not wait for it.",
        "It does not run, or a train op outside that waits for it does nothing at all, "
        "without an error, where the branch is not taken.",
        'Update in place: bn_tf1.batch_norm(x, is_training, update="in_place"). Or call '
        "the layer outside of tf.cond and tf.while_loop.",
    ),
    Check(
        "several-updates",
        "graph",
        ("error", "warning", "note"),
        "One training step updates a moving statistic several times.",
        "A layer that is called several times (towers, a discriminator on real and "
        "generated data) mixes the statistics of all calls. Updates "
        "that read one old value move it N (1 - decay) times the way to the batch: from "
        "1 on too far, and from 2 on the statistics diverge.",
        "Choose the calls whose statistics count. In the others, bn_tf1.batch_norm("
        'x, is_training, update="skip"). For towers, take the updates of the first alone: '
        "bn_tf1.make_train_op(loss, optimizer, update_ops=tf.get_collection("
        "tf.GraphKeys.UPDATE_OPS, scope)). Where all count, make_train_op lets them follow "
        'one another, or, with bn_tf1.batch_norm(x, is_training, update="merged"), makes '
        "one update by all of them together.",
    ),
    Check(
        "zero-debias",
        "graph",
        ("warning", "note"),
        "The moving statistics are zero-debiased, which keeps them in hidden variables.",
        "A checkpoint restored without these variables loses its moving statistics at "
        "the first update: the mean becomes that of one batch.",
        "Pass zero_debias=False to assign_moving_average, or zero_debias_moving_mean="
        f"False in slim. Or see that every checkpoint holds them: {_ALL_VARIABLES}",
    ),
    Check(
        "statistics-trained",
        "graph",
        ("error", "warning"),
        "An optimizer trains moving statistics, or may: they are among the trainable.",
        "Gradients move them away from the statistics of the data. They are no longer "
        "averages, and a moving variance can become negative.",
        "Create them with trainable=False, and train the others alone: "
        "optimizer.minimize(loss, var_list=[v for v in tf.trainable_variables() if "
        "'moving_' not in v.op.name]). bn_tf1.batch_norm keeps them out by itself.",
    ),
    Check(
        "inference-mode-in-training",
        "graph",
        ("warning",),
        "A layer whose gamma or beta is trained normalises with the moving statistics.",
        "The moving statistics are never updated. Trained from the start, they stay at 0 "
        "and 1, and the layer normalises nothing. Only a layer that was restored and "
        "frozen on purpose is meant to be like this.",
        "Build the training graph in training mode: bn_tf1.batch_norm(x, "
        "is_training=True), or training=True in tf.layers. To freeze the layer "
        "altogether, add trainable=False.",
    ),
    Check(
        "training-mode-in-inference",
        "graph",
        ("error",),
        "A graph for inference normalises with the statistics of its batch.",
        "A prediction depends on the other examples of its batch, and is wrong for a "
        "batch of one. The moving statistics that were learned are not used.",
        f"{_EXPORT} Or build it anew and restore the checkpoint into it: with "
        "tf.Graph().as_default(): y = bn_tf1.batch_norm(x, is_training=False)",
    ),
    Check(
        "training-mode-by-default",
        "graph",
        ("warning",),
        "The served outputs use batch statistics unless somebody feeds is_training.",
        "Who asks for a prediction feeds the inputs of the signature alone. It then "
        "depends on the other examples of the batch, and is wrong for a batch of one.",
        f"{_EXPORT} Or save it with is_training=False, or with a default of False: "
        "is_training = tf.placeholder_with_default(False, [])",
    ),
    Check(
        "one-value-per-channel",
        "graph",
        ("error",),
        "Batch statistics are taken over one value per channel.",
        "The variance of one value is 0. The output is beta whatever the input, and the "
        "moving variance decays to 0, or becomes NaN in cuDNN's kernel.",
        "Use a larger batch, or normalise with the moving statistics here: "
        "bn_tf1.batch_norm(x, is_training=False)",
    ),
    Check(
        "statistics-not-saved",
        "graph",
        ("error", "warning"),
        "The saver of the graph leaves the moving statistics out.",
        "Moving statistics are not trainable, so that a saver of the trainable variables "
        "drops them. Evaluation starts from a mean of 0 and a variance of 1.",
        f"Save all variables: {_ALL_VARIABLES}",
    ),
    Check(
        "unusual-decay",
        "graph",
        ("error", "warning"),
        "The decay of the moving statistics is one that none is meant to have.",
        "With a small one the moving statistics are those of the last few batches (a "
        "momentum of PyTorch is 1 - decay: its 0.1 is a decay of 0.9). With one too near "
        "1 they keep their initial values for longer than the run; from 1 on they never "
        "move, or run away.",
        "Give a usual one: bn_tf1.batch_norm(x, is_training, decay=0.99), or "
        "momentum=0.99 in tf.layers and Keras.",
    ),
    Check(
        "unusual-epsilon",
        "graph",
        ("warning",),
        "Epsilon does not protect, or drowns the variance.",
        "With a small one, a channel whose variance is near 0 is divided by almost 0: "
        "its output and its gradient explode or become NaN. A large one, of the order of "
        "the variance, shrinks the output of channels with a small variance.",
        "Give a usual one, the same in training and evaluation: "
        "bn_tf1.batch_norm(x, is_training, epsilon=1e-3)",
    ),
    Check(
        "weight-decay",
        "graph",
        ("warning",),
        "There is a penalty on gamma or beta.",
        "It pulls the layer's output to 0 and makes no function smoother. Most training "
        "recipes leave gamma and beta out.",
        "Take the penalty over the other variables: [tf.nn.l2_loss(v) for v in "
        "tf.trainable_variables() if not v.op.name.endswith(('gamma', 'beta'))]",
    ),
    Check(
        "broken-freeze",
        "graph",
        ("error",),
        "The graph was frozen such that it cannot be imported, or cannot run.",
        "tf.import_graph_def or the first run fails, in TensorFlow and in whatever "
        "converts the file.",
        f"{_EXPORT} With --to frozen it is frozen. Or build it with "
        "bn_tf1.batch_norm(x, is_training=False) before it is frozen.",
    ),
    Check(
        "stored-shapes",
        "graph",
        ("note",),
        "TensorFlow 2 does not import the graph: TensorFlow 1 stored other shapes.",
        'tf.train.import_meta_graph fails with "... has an _output_shapes attribute '
        'inconsistent with the GraphDef". TensorFlow 1.15 imports it.',
        "Take the stored shapes of these gradients out: python -m bn_tf1 migrate_graph "
        "OLD.meta NEW.meta",
    ),
    Check(
        "bias-before-batch-norm",
        "graph",
        ("note",),
        "A bias is added just before the layer, which subtracts it again.",
        "The layer subtracts the mean, and the bias with it. The bias has no effect in "
        "training, and costs memory and time; beta takes its place.",
        "Leave it out: tf.layers.conv2d(..., use_bias=False)",
    ),
    Check(
        "no-batch-norm",
        "graph",
        ("note",),
        "There is no batch-norm layer to check.",
        "A batch norm that was folded into a convolution, or optimised away, cannot be "
        "checked any more.",
        "Check the graph from before the folding, or the training graph: "
        "python -m bn_tf1 doctor model.ckpt.meta",
    ),
    # -------------------------------------------------------------------- a checkpoint
    Check(
        "never-updated",
        "checkpoint",
        ("error", "note"),
        "Moving statistics are at their initial values in every channel.",
        "Evaluation normalises with them instead of with those of the data, and is far "
        "worse than training.",
        "Run the updates in every training step: train_op = bn_tf1.make_train_op(loss, "
        "optimizer), or with tf.control_dependencies(tf.get_collection("
        "tf.GraphKeys.UPDATE_OPS)): train_op = optimizer.minimize(loss). "
        + _RECALIBRATE,
    ),
    Check(
        "not-converged",
        "checkpoint",
        ("warning", "note"),
        "Much of the moving statistics is still their initial value.",
        "Evaluation normalises with a mixture of the initial values and the data, and is "
        "worse than training by as much.",
        f"Train longer, or use a smaller decay. {_RECALIBRATE}",
    ),
    Check(
        "statistics-missing",
        "checkpoint",
        ("error", "warning", "note"),
        "A layer has no moving mean or variance in the checkpoint.",
        "Evaluation restores nothing for it: it normalises with a mean of 0 and a "
        "variance of 1, or does not start.",
        f"Save all variables, not the trainable ones alone: {_ALL_VARIABLES}",
    ),
    Check(
        "sizes-differ",
        "checkpoint",
        ("error",),
        "The variables of one layer have different sizes.",
        "They cannot belong to one layer: a restore fails, or broadcasts wrongly.",
        "Find out which of them was written by another model, and restore that one from "
        "the right checkpoint: tf.train.Saver(var_list={{name: variable}})",
    ),
    Check(
        "not-finite",
        "checkpoint",
        ("error",),
        "A variable of a layer holds NaN or infinity.",
        "Every prediction in evaluation is NaN. One bad batch is enough: a moving "
        "average never forgets a NaN.",
        "Take an older checkpoint, and keep bad batches out of the average: "
        "bn_tf1.batch_norm(x, is_training) leaves the statistics as they are for such a "
        "batch.",
    ),
    Check(
        "negative-variance",
        "checkpoint",
        ("error",),
        "A moving variance is negative.",
        "The root of a negative variance is NaN, or tiny if epsilon hides it; no average "
        "of variances is negative.",
        "It was computed as E[x^2] - E[x]^2, debiased wrongly, trained by an optimizer, "
        "or moved too far by many updates in one step (a layer that is called N times, "
        "with N (1 - decay) above 1): use bn_tf1.batch_norm and bn_tf1.make_train_op. "
        + _RECALIBRATE,
    ),
    Check(
        "statistics-diverged",
        "checkpoint",
        ("error",),
        "Moving statistics are larger than those of any data.",
        "Evaluation gives nothing but beta, or NaN. An average of batches cannot be far "
        "larger than the batches.",
        "Most often one layer is called many times in a training step, and its updates "
        "read one old value: N of them move it N (1 - decay) times the way to the batch, "
        "which from 2 on grows without bound. Update once in each step: "
        'bn_tf1.batch_norm(x, is_training, update="skip") in the other calls, or one '
        "after the other: bn_tf1.make_train_op(loss, optimizer). " + _RECALIBRATE,
    ),
    Check(
        "optimizer-slots",
        "checkpoint",
        ("error",),
        "There are slots of an optimizer beside moving statistics: it trains them.",
        "Gradients move them away from the statistics of the data. They are no longer "
        "averages, and a moving variance can become negative.",
        "Train the other variables alone: optimizer.minimize(loss, var_list=[v for v in "
        "tf.trainable_variables() if 'moving_' not in v.op.name]). " + _RECALIBRATE,
    ),
    Check(
        "dead-channels",
        "checkpoint",
        ("warning",),
        "The moving variance of channels is below epsilon.",
        "Nothing varies in these channels: their output is a constant, and the least "
        "deviation in evaluation is multiplied by up to 1 / sqrt(epsilon).",
        "A few are usual behind a ReLU. If there are many, look at the layer before: a "
        "smaller learning rate, another initialisation, a leaky ReLU "
        "(tf.nn.leaky_relu(x)); an input that is scaled to a variance near 1.",
    ),
    Check(
        "silent-channels",
        "checkpoint",
        ("warning", "note"),
        "Channels have so small a beta that a ReLU behind the layer gives only 0.",
        "A normalised channel is hardly ever above 3 |gamma| + beta. Where that is below "
        "0, the ReLU gives 0 whatever the input, and passes no gradient: the channel is "
        "lost, and does not come back.",
        "Few are the network's way to leave out what it does not need. If there are many, "
        "begin anew with a smaller learning rate, or a warm-up of it; without weight "
        "decay on gamma and beta; or with tf.nn.leaky_relu(x).",
    ),
    Check(
        "mean-far-outside",
        "checkpoint",
        ("warning",),
        "The moving mean of channels is a hundred deviations and more from 0.",
        "Mean and variance hardly belong together, or the input has an offset that "
        "swallows its digits: float32 then loses the variance.",
        "Subtract the offset from the input, x = x - tf.constant(offset), and see that "
        "both statistics are updated by the same step.",
    ),
    Check(
        "debias-counter",
        "checkpoint",
        ("error", "warning"),
        "What an average counts or hides does not fit its value.",
        "A zero-debiased average recomputes its value from `biased` and `local_step`, and "
        "one by the number of updates weighs it by `num_updates`: the first update after a "
        "restore replaces the moving statistics by something else.",
        "Restore `biased` and `local_step`, or `num_updates`, with the statistics, or "
        "build the layer "
        "without them: bn_tf1.batch_norm(x, is_training), in slim "
        "zero_debias_moving_mean=False.",
    ),
    Check(
        "weights-not-finite",
        "checkpoint",
        ("error",),
        "A variable outside of the layers holds NaN or infinity.",
        "Whatever depends on this variable is NaN.",
        "Take an older checkpoint, and stop a run whose loss is not finite: "
        "tf.train.NanTensorHook(loss)",
    ),
    Check(
        "damaged-tensor",
        "checkpoint",
        ("error",),
        "A tensor cannot be read, or is not what was written.",
        "A restore of this checkpoint fails with DataLossError or OutOfRangeError, and "
        "the run or the evaluation ends.",
        "Take a copy of the checkpoint or an older one: "
        "saver.restore(session, older_checkpoint)",
    ),
    Check(
        "graph-unreadable",
        "checkpoint",
        ("warning",),
        "The graph beside a checkpoint cannot be read.",
        "tf.train.import_meta_graph fails, and decay, epsilon and modes are unknown.",
        "Build the graph from its code and write it again: "
        "tf.train.export_meta_graph({path!r})",
    ),
    # ------------------------------------------------------------ a training directory
    Check(
        "statistics-stand-still",
        "training directory",
        ("error", "warning", "note"),
        "Moving statistics are the same to the bit in checkpoints of different steps.",
        "Nobody updates them any more: the longer the run, the further evaluation is "
        "from what was trained. For a layer that is frozen on purpose it is right.",
        "Run the updates in every step: train_op = bn_tf1.make_train_op(loss, "
        "optimizer); or freeze the layer wholly: bn_tf1.batch_norm(x, "
        "is_training=False, trainable=False)",
    ),
    Check(
        "statistics-jump",
        "training directory",
        ("error", "warning"),
        "Moving statistics jump, or are initial ones again, between two checkpoints.",
        "A moving average moves slowly: the input changed, the training diverged, or the "
        "statistics were replaced or not restored when the run went on.",
        "Look at the loss and the input between these steps, and restore all variables "
        "when a run goes on: bn_tf1.restore(session, checkpoint) tells what is missing.",
    ),
    Check(
        "checkpoint-damaged",
        "training directory",
        ("error", "warning"),
        "A checkpoint of the run cannot be read.",
        "A restart fails on the newest checkpoint, with no fallback; whoever restores or "
        "averages over an older one fails.",
        "Put a good copy back, or name an older one in the state file: "
        "tf.train.update_checkpoint_state({directory!r}, older)",
    ),
    Check(
        "checkpoint-missing",
        "training directory",
        ("error", "warning"),
        "The state file lists a checkpoint that is not there.",
        f"Where it is the newest, {_STARTS_ANEW} Whoever averages over the listed "
        "checkpoints fails.",
        f"Put it back, or name one that is there: {_WRITE_STATE}",
    ),
    Check(
        "index-missing",
        "training directory",
        ("warning",),
        "There are data files of a checkpoint, but not its index.",
        "The checkpoint cannot be read: its save or its removal was cut off, or the "
        "index was lost.",
        "Put the index back, or remove the rest: os.remove({data!r})",
    ),
    Check(
        "state-file-missing",
        "training directory",
        ("warning", "note"),
        "There are checkpoints, but no state file `checkpoint`.",
        _STARTS_ANEW,
        f"Write it anew: {_WRITE_STATE}",
    ),
    Check(
        "state-file-damaged",
        "training directory",
        ("error",),
        "The state file is empty, garbage or cannot be read.",
        f"{_STARTS_ANEW} An empty one ends it with an error.",
        f"Write it anew: {_WRITE_STATE}",
    ),
    Check(
        "state-file-elsewhere",
        "training directory",
        ("warning",),
        "The state file names a checkpoint that is elsewhere by its path, but here.",
        f"The directory was moved. {_STARTS_ANEW}",
        f"Write it anew: {_WRITE_STATE}, or save with "
        "tf.train.Saver(save_relative_paths=True)",
    ),
    Check(
        "state-file-behind",
        "training directory",
        ("warning",),
        "There is a newer checkpoint than the state file names.",
        "A run that is started again goes on from the older one.",
        f"Write it anew: {_WRITE_STATE}",
    ),
    Check(
        "first-format",
        "training directory",
        ("note",),
        "A checkpoint is in TensorFlow's first format, which is not examined.",
        "Nothing is known of its statistics.",
        f"Write it anew: {_ANEW}",
    ),
    Check(
        "events-not-finite",
        "training directory",
        ("error", "warning"),
        "A scalar in the event files is NaN or infinite.",
        "One batch of NaN makes the moving statistics NaN for ever, and a checkpoint "
        "written after it cannot be used.",
        "Go on from a checkpoint before that step with a smaller learning rate, and stop "
        "at the first NaN: hooks=[tf.train.NanTensorHook(loss)]",
    ),
)
BY_NAME = {check.name: check for check in CHECKS}
