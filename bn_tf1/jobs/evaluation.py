"""The evaluation job: checkpoints of a training run measured on held-out data.

Contract: the network is built with `is_training=False`, from the configuration that the
training run saved, and every one of its variables is restored, the moving statistics
included; a checkpoint without one of them is an error. On the side it is checked that a
prediction does not depend on the rest of its batch, and moving statistics that are
surely wrong are reported on stderr. Each measurement goes to TensorBoard summaries and,
as one JSON line, to `results.jsonl` in the evaluation folder.

Following a run, it measures each step once at most, in their order, also when it is
started again: it begins behind the last step in `results.jsonl`. Without one it begins
with the newest checkpoint, or, where there is none yet, with the first that comes. Each
checkpoint after that is measured, or reported on stderr as skipped: because it is damaged,
or because the training job, which notes what it saves (see `saved_steps`), removed it too
early. A measurement asked for by name or by `run_once` is made in any case, but not
written down again where it is the same as the last line of the file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from typing import Iterator, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.doctor.checkpoint_checks.whole_checkpoint import audit_file
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import memory_allocator, network_from_config, summaries
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.data.array_batches import ArrayBatches
from bn_tf1.jobs.finished.recalibrated_runs import BATCH_SIZE, SwitchedNetwork
from bn_tf1.jobs.reporting.live_report import LiveReport
from bn_tf1.jobs.saving import (
    committing_saver,
    durable_files,
    run_lock,
    saved_steps,
)
from bn_tf1.jobs.saving.committing_saver import DamagedCheckpoint, SavedCheckpoint

RESULTS_FILE = "results.jsonl"
_BATCH_SIZE = 256
# The most that such a batch holds: photographs go in smaller ones, since the first layers of
# a network make twenty times as much of them.
_BATCH_VALUES = 1 << 22
# With ten classes or fewer, a hit among the best five says little.
_TOP5_CLASSES = 11
_POLL_SECS = 0.5


class EvaluationError(RuntimeError):
    """A checkpoint cannot be evaluated, or there is none."""


class EvaluationTimeout(EvaluationError):
    """No new checkpoint came in time, before the last step, and nobody trains."""


class TrainingStalled(EvaluationTimeout):
    """No new checkpoint came in time, though a process is training."""


class Request(NamedTuple):
    """What to evaluate.

    Attributes:
        model_dir: folder of the training run.
        split: "test" or "train".
        eval_dir: folder for the results; `model_dir`/eval by default, with "_ema" for
            `weight_ema` and "_train" for the training split.
        checkpoint_path: the one checkpoint to evaluate, instead of the newest.
        run_once: evaluates one checkpoint instead of following the training run.
        timeout_secs: seconds to wait for a new checkpoint; None for ever.
        weight_ema: measures the averages of the weights, with the statistics of the
            training examples, which are computed for them.
    """

    model_dir: str
    split: str = "test"
    eval_dir: str | None = None
    checkpoint_path: str | None = None
    run_once: bool = False
    timeout_secs: float | None = None
    weight_ema: bool = False


class Result(NamedTuple):
    """The measurement of one checkpoint.

    Attributes:
        step: the global step at which the checkpoint was saved.
        checkpoint: its path.
        split: the split of the data set.
        examples: the number of examples.
        accuracy: share of right predictions.
        accuracy_top5: share of labels among the five largest logits; None for ten
            classes or fewer.
        loss: mean cross-entropy in nats, without the L2 penalty.
        batch_dependence: largest change of a logit when its example is evaluated
            alone, as a share of the largest logit.
    """

    step: int
    checkpoint: str
    split: str
    examples: int
    accuracy: float
    accuracy_top5: float | None
    loss: float
    batch_dependence: float


class _Graph(NamedTuple):
    images: tf.Tensor
    logits: tf.Tensor
    losses: tf.Tensor
    hits: tf.Tensor
    hits_top5: tf.Tensor
    global_step: tf.Variable
    restart: tf.Operation
    refold: tf.Operation


def evaluate(request: Request) -> Iterator[Result]:
    """Evaluates checkpoints and writes down and yields each result.

    Yields:
        One `Result` for `run_once` or `checkpoint_path`, otherwise one for each new
        checkpoint until that of the last step; none if that was measured before.

    Raises:
        EvaluationError: there is no checkpoint that can be read, it lacks a variable,
            or a prediction depends on the rest of its batch.
        EvaluationTimeout: no new checkpoint came for `timeout_secs`.
        bn_tf1.jobs.config.ConfigError: the model directory has no configuration.
        bn_tf1.jobs.data.idx_and_cifar.DataFileError: a data file is missing or damaged.
    """
    configuration.check_folder("model_dir", request.model_dir)
    configuration.check_folder("eval_dir", _eval_dir(request))
    if _is_measured_to_the_end(request):
        return
    candidates = _candidates(request)
    first = next(candidates)  # config.json is there once a checkpoint is
    config = configuration.load(request.model_dir)
    if config.keep_memory:
        memory_allocator.keep_memory()
    dataset = network_from_config.open_split(config, request.split)
    eval_dir = _eval_dir(request)
    durable_files.make_folder(eval_dir, "--eval_dir")
    with tf.Graph().as_default(), contextlib.ExitStack() as stack:
        graph = _build_graph(config, dataset)
        # All of them, and not the trainable ones: the moving statistics are none.
        saver = tf.train.Saver(tf.global_variables())
        session = stack.enter_context(tf.Session())
        writer = stack.enter_context(summaries.CurveWriter(eval_dir))
        averages = None
        if request.weight_ema:
            averages = stack.enter_context(_averages(config))
        skipped = False
        for checkpoint in itertools.chain([first], candidates):
            try:
                _restore(session, saver, graph, checkpoint.path, averages)
            except DamagedCheckpoint as error:
                # Or removed by the training job since it was listed: it keeps so many.
                _report(f"skipped step {checkpoint.step}: {error}")
                skipped = True
                continue
            with dataset.failures_named():
                result = _measure(session, graph, checkpoint.path, request.split)
            _write(result, writer, eval_dir)
            if skipped and request.run_once:
                _report(
                    f"warning: step {result.step} was evaluated, an older one: the "
                    "newest checkpoint cannot be read"
                )
            yield result
            # Not before: what was measured is worth knowing, and says how far it is off.
            _check_batch_independence(result)
            # Read anew, since the run may have been prolonged meanwhile.
            last = configuration.load(request.model_dir).max_steps
            if not _is_following(request) or result.step >= last:
                _refresh_report(request)
                return


def _refresh_report(request):
    """With what was measured last, unless the training job still does it."""
    # Runs are evaluated where they can only be read, too, with an --eval_dir elsewhere.
    is_writable = os.access(request.model_dir, os.W_OK)
    if is_writable and not run_lock.is_held(request.model_dir):
        LiveReport(request.model_dir).write()


def _eval_dir(request):
    default = "eval_ema" if request.weight_ema else "eval"
    default += "" if request.split == "test" else "_train"
    return request.eval_dir or os.path.join(request.model_dir, default)


def _is_measured_to_the_end(request):
    """Whether there is nothing left to follow; says so on stdout."""
    if not _is_following(request):
        return False
    step = _last_measured_step(request)
    if step is None or step < configuration.load(request.model_dir).max_steps:
        return False
    path = os.path.join(_eval_dir(request), RESULTS_FILE)
    print(f"step {step}, the last one, is measured already: see {path}", flush=True)
    return True


def _is_following(request):
    return not (request.run_once or request.checkpoint_path)


def _candidates(request) -> Iterator[SavedCheckpoint]:
    """The checkpoints to measure, each as soon as it is there; then the reason to end."""
    if request.checkpoint_path:
        yield _named_checkpoint(request.checkpoint_path)
        raise EvaluationError(
            f"--checkpoint_path is {request.checkpoint_path!r}, which is damaged"
        )
    if request.run_once:
        if not os.path.isdir(request.model_dir):
            raise EvaluationError(
                f"--model_dir is {request.model_dir!r}, but there is no such folder: "
                "train.py makes it when a run begins"
            )
        listed = committing_saver.listed(request.model_dir)
        # All of them: where the newest is damaged, the one before it is asked for next.
        yield from reversed(listed)
        what = "that can be read " if listed else ""
        raise EvaluationError(
            f"--model_dir is {request.model_dir!r}, but there is no checkpoint {what}"
            f"in it: {_hint_of_runs(request.model_dir)}"
        )
    yield from _follow(request)
    state = f"no new checkpoint in {request.model_dir} for {request.timeout_secs:g} "
    state += "seconds, and the last step was not reached"
    if run_lock.is_held(request.model_dir):
        raise TrainingStalled(f"{state}; a process is still training there")
    raise EvaluationTimeout(f"{state}; no process is training there")


def _hint_of_runs(folder):
    """Where runs are that may be meant by a folder that is none."""
    above = os.path.dirname(os.path.abspath(folder))
    if os.path.exists(os.path.join(above, configuration.CONFIG_FILE)):
        return f"did you mean the folder above, --model_dir={os.path.relpath(above)}?"
    inner = [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if os.path.exists(os.path.join(folder, name, configuration.CONFIG_FILE))
    ]
    return f"there are runs in {', '.join(inner)}" if inner else "run train.py first"


def _named_checkpoint(path):
    folder, advice = os.path.dirname(path) or ".", ""
    if not tf.io.gfile.exists(path + ".index"):
        problem = f"but there is no {path}.index"
        if os.path.isdir(path):
            folder, problem = path, "which is a folder"
            advice = (
                f": give --model_dir={path} for its newest checkpoint, or one of its "
            )
            advice += "checkpoints"
    else:
        try:
            committing_saver.verify(path)
            return SavedCheckpoint(0, path)
        except DamagedCheckpoint as error:
            problem = f"which is damaged: {error.reason}"
    raise EvaluationError(
        f"--checkpoint_path is {path!r}, {problem}{advice}; {_there_are(folder)}"
    )


def _there_are(folder):
    """The checkpoints of a folder, in words, for somebody who mistyped one."""
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    paths = [checkpoint.path for checkpoint in committing_saver.listed(folder)]
    return f"there are {', '.join(paths)}" if paths else f"{folder} has no checkpoint"


def _follow(request) -> Iterator[SavedCheckpoint]:
    """Each new checkpoint once, in order, until none has come for `timeout_secs`."""
    last = _step_to_begin_after(request)
    # Not tf.train.checkpoints_iterator: it sees the newest alone, dies of one that is gone
    # when it is read (tensorflow#39033), and cannot say what it missed.
    waiting_since, told = time.time(), None
    timeout_secs = (
        float("inf") if request.timeout_secs is None else request.timeout_secs
    )
    while True:
        listed = committing_saver.listed(request.model_dir)
        new = sorted(c for c in listed if c.step > last)
        if new:
            _report_gap(request.model_dir, last, listed)
        for checkpoint in new:
            last = checkpoint.step
            yield checkpoint
            waiting_since = time.time()  # measuring is no waiting
        if new:
            continue  # more may have come while these were measured
        left = waiting_since + timeout_secs - time.time()
        if left <= 0:
            return
        if told != last:  # once for each checkpoint, and not at each look
            told = last
            _report(_waited_for(request, last))
        time.sleep(min(_POLL_SECS, left))


def _waited_for(request, last):
    """In words: what is waited for, where, how long, and whether it may come at all."""
    # Who mistyped --model_dir would wait for ever, and not know it.
    what = "the first checkpoint" if last < 0 else f"the checkpoint after step {last}"
    folder, limit = request.model_dir, request.timeout_secs
    if not os.path.isdir(folder):
        state = "there is no such folder yet: is --model_dir right?"
    elif run_lock.is_held(folder):
        state = "a process is training there"
    else:
        state = "no process is training there now"
    how_long = "" if limit is None else f" for {limit:g} s"
    return f"waiting{how_long} for {what} in {folder}: {state}; Ctrl-C ends it"


def _step_to_begin_after(request):
    """The last step measured before, the newest but one, or -1 before the first."""
    measured = _last_measured_step(request)
    if measured is not None:
        return measured
    steps = {c.step for c in committing_saver.listed(request.model_dir)}
    newest = max(steps, default=0)
    if min(steps | saved_steps.read(request.model_dir), default=0) < newest:
        _report(f"beginning with step {newest}: earlier ones are not measured")
    return newest - 1


def _last_measured_step(request):
    """The last step of this run and split in `results.jsonl`; None for none."""
    saved = saved_steps.read(request.model_dir)
    # The folder may hold results of a run that was there before.
    return max((s for s in _measured_steps(request) if s in saved), default=None)


def _measured_steps(request):
    """The steps in `results.jsonl` that are of this split and model directory."""
    path = os.path.join(_eval_dir(request), RESULTS_FILE)
    if not os.path.exists(path):
        return []
    steps = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            # A killed evaluation may have left half a line.
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                result = json.loads(line)
                if _is_of(request, result):
                    steps.append(int(result["step"]))
    return steps


def _is_of(request, result):
    if result["split"] != request.split:
        return False
    # What lies in the model directory itself may have been moved with it.
    folder = os.path.dirname(result["checkpoint"])
    return request.eval_dir is None or (
        os.path.realpath(folder) == os.path.realpath(request.model_dir)
    )


def _report_gap(model_dir, last, listed):
    """Names the checkpoints after step `last` that have come and gone unseen."""
    steps = {checkpoint.step for checkpoint in listed}
    saved = saved_steps.read(model_dir)
    # Steps beyond the newest are of a commit that is under way: noted, but not named yet.
    gone = sorted(step for step in saved - steps if last < step < max(steps))
    if gone:
        steps_gone = f"step{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
        _report(f"skipped {steps_gone}: removed before it could be measured")
    first = min(step for step in steps if step > last)
    # They are removed in order: while the last one is there, none that is newer is gone.
    is_complete = last in saved or last in steps or (last == -1 and saved)
    if first > last + 1 and not is_complete:
        path = os.path.join(model_dir, saved_steps.FILE)
        _report(
            f"skipped steps {last + 1} to {first - 1}: {path} does not tell whether one "
            "of them was saved and removed before it could be measured"
        )


def _report(text):
    print(text, file=sys.stderr, flush=True)


def _report_sick_statistics(path):
    """Says on stderr what is surely wrong with the moving statistics of a checkpoint."""
    try:
        findings = audit_file(open_tensors(path)).findings
    except CheckpointError as error:  # removed since it was restored
        _report(f"warning: not audited: {error}")
        return
    for finding in findings:
        if finding.gravity == "error":  # the doctor, asked by itself, tells the rest
            place = finding.layer or finding.where
            _report(f"warning: {place}: {finding.what} {finding.remedy}")


def _build_graph(config, dataset):
    fitting = _BATCH_VALUES // int(np.prod(dataset.image_shape))
    batch_size = max(1, min(_BATCH_SIZE, fitting))
    batches = datasets.evaluation_batches(dataset, batch_size)
    iterator = tf.data.make_initializable_iterator(batches)
    next_images, labels = iterator.get_next()
    # Can be fed, to evaluate an example in another company.
    images = tf.placeholder_with_default(next_images, next_images.shape)
    objective = network_from_config.build(
        images, labels, False, config, dataset.num_classes, fold_once=True
    )
    best = min(5, dataset.num_classes)
    hits_top5 = tf.cast(tf.nn.in_top_k(objective.logits, labels, best), tf.float32)
    return _Graph(
        images=images,
        logits=objective.logits,
        losses=objective.losses,
        hits=objective.hits,
        hits_top5=hits_top5,
        global_step=tf.train.get_or_create_global_step(),
        restart=iterator.initializer,
        # What is folded is made of the variables, and follows them when this runs.
        refold=tf.local_variables_initializer(),
    )


def _restore(session, saver, graph, path, averages=None):
    """The variables of a checkpoint, or the `averages` of its weights if there are."""
    committing_saver.verify(path)
    with _damage_named(path):
        shapes = tf.train.NewCheckpointReader(path).get_variable_to_shape_map()
    # Before it is restored: TensorFlow's errors do not tell a damaged file, which is passed
    # over, from one of another network.
    misfit = network_from_config.misfit(shapes, path)
    if misfit is not None:
        raise EvaluationError(misfit)
    with _damage_named(path):
        if graph.global_step.op.name in shapes:
            saver.restore(session, path)
        else:
            # Weights that were published without the step that they were trained to.
            session.run(graph.global_step.initializer)
            variables = [v for v in tf.global_variables() if v is not graph.global_step]
            bn_tf1.restore(session, path, variables=variables)
    if averages is None:
        _report_sick_statistics(path)
    else:
        _load_averages(session, averages, path)
    session.run(graph.refold)


@contextlib.contextmanager
def _damage_named(path):
    try:
        yield
    except committing_saver.READ_ERRORS as error:
        raise DamagedCheckpoint(path, str(error)) from error


def _averages(config):
    if not config.weight_ema_decay:
        raise EvaluationError(
            f"--weight_ema is given, but the run in {config.model_dir} keeps no averages "
            "of its weights: train with --weight_ema_decay"
        )
    training = ArrayBatches(network_from_config.open_split(config, "train"), BATCH_SIZE)
    return contextlib.closing(SwitchedNetwork(config, training))


def _load_averages(session, averages, path):
    """Gives the session the averages of the weights, and statistics that are theirs."""
    averages.restore(path, ema=True)
    # Averages are kept of the weights alone: the statistics in the file belong to others
    # (tensorflow#3684).
    averages.recalibrate()
    values = averages.values()
    for variable in tf.global_variables():
        variable.load(values[variable.op.name], session)


def _measure(session, graph, path, split):
    session.run(graph.restart)
    # By example and not by batch: the last batch is smaller, and would count too much.
    fetches = [graph.losses, graph.hits, graph.hits_top5]
    first = session.run([graph.images, graph.logits] + fetches)
    dependence = _batch_dependence(session, graph, *first[:2])
    batches = [first[2:]]
    while True:
        try:
            batches.append(session.run(fetches))
        except tf.errors.OutOfRangeError:
            break
    losses, hits, hits_top5 = (np.concatenate(parts) for parts in zip(*batches))
    # In float64, in which a share is the quotient of two counts to the last digit shown.
    accuracy, accuracy_top5, loss = (
        float(np.mean(values, dtype=np.float64)) for values in (hits, hits_top5, losses)
    )
    return Result(
        step=int(session.run(graph.global_step)),
        checkpoint=path,
        split=split,
        examples=len(losses),
        accuracy=accuracy,
        accuracy_top5=accuracy_top5
        if graph.logits.shape[-1] >= _TOP5_CLASSES
        else None,
        loss=loss,
        batch_dependence=dependence,
    )


def _batch_dependence(session, graph, images, logits):
    # One example is enough: a network that normalises with the batch does it to all.
    alone = session.run(graph.logits, {graph.images: images[:1]})
    return float(np.max(np.abs(alone - logits[:1])) / np.max(np.abs(logits)))


def _check_batch_independence(result):
    # Kernels sum in another order for another batch size, which costs some units of
    # 2^-24; batch statistics move logits by a good part of their size.
    if not result.batch_dependence < 1e-3:
        raise EvaluationError(
            f"a logit changes by {result.batch_dependence:.2g} of the largest one when "
            "its example is evaluated alone: the network uses statistics of the batch, "
            f"or its weights are not finite (step {result.step})"
        )


def _write(result, writer, eval_dir):
    values = {name: v for name, v in result._asdict().items() if v is not None}
    tags = [tag for tag in ("loss", "accuracy", "accuracy_top5") if tag in values]
    writer.add_scalars({tag: values[tag] for tag in tags}, result.step)
    writer.flush()
    path = os.path.join(eval_dir, RESULTS_FILE)
    line = json.dumps(values).encode()
    # Appended in one write, so that what is there already is never lost.
    with open(path, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(line) - 2))
        end = file.read()
        # A killed evaluation may have left half a line.
        start = b"" if end.endswith(b"\n") or not end else b"\n"
        if not (b"\n" + end).endswith(b"\n" + line + b"\n"):
            file.write(start + line + b"\n")
