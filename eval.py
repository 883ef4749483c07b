"""Evaluates the checkpoints of a training run on held-out data.

The model and the data set are read from the config.json of the run. By default
it follows the run and evaluates each new checkpoint until the last step.
"""

import os
import re
import sys

# Read by bn_tf1, which then leaves it to this program when TensorFlow is imported.
IMPORTS_TENSORFLOW_ITSELF = True

from bn_tf1 import quiet_start

with quiet_start.importing(verbose=quiet_start.is_verbose(sys.argv)):
    from absl import flags

    from bn_tf1.jobs.config import Config, ConfigError
    from bn_tf1.jobs.process import command_line

FLAGS = flags.FLAGS

EXAMPLES = (
    "--run_once              # the newest checkpoint",
    "--model_dir=runs/mnist  # each new one, beside train.py",
    "--model_dir=runs/mnist --run_once --divergence",
    "--checkpoint_path=runs/mnist/model.ckpt-600 --split=train",
)


def define_flags():
    what, when = {"module_name": "what to evaluate"}, {"module_name": "when"}
    text = (
        "Folder of the training run; that of --checkpoint_path by default if that is "
    )
    text += "given."
    flags.DEFINE_string("model_dir", Config.model_dir, text, **what)
    flags.DEFINE_alias("train_dir", "model_dir")
    text = "The one checkpoint to evaluate, such as runs/default/model.ckpt-1000."
    flags.DEFINE_string("checkpoint_path", None, text, **what)
    text = "Part of the data set to evaluate on."
    flags.DEFINE_enum("split", "test", ["test", "train"], text, **what)
    text = (
        "A model that `python -m bn_tf1 export` made of the run: measures it, by the "
    )
    text += "runtime of its format, instead of a checkpoint."
    flags.DEFINE_string("exported", None, text, **what)
    text = "Also prints the accuracy with batch statistics, and which layer's moving "
    text += "statistics cost how much of it."
    flags.DEFINE_boolean("divergence", False, text, **what)
    text = "Folder for summaries and results.jsonl; model_dir/eval by default, "
    text += "model_dir/eval_train for --split=train."
    flags.DEFINE_string("eval_dir", None, text, **what)
    text = "Evaluates the newest checkpoint and exits, instead of following the run."
    flags.DEFINE_boolean("run_once", False, text, **when)
    text = "Seconds to wait for a new checkpoint before giving up; for ever by default."
    flags.DEFINE_float("timeout_secs", None, text, lower_bound=0.0, **when)
    text = (
        "Measures the averages of the weights that train.py --weight_ema_decay keeps, "
    )
    text += "with statistics that are computed for them over the training set."
    flags.DEFINE_boolean("weight_ema", False, text, **what)


def _check_names():
    for name in ("model_dir", "eval_dir", "checkpoint_path"):
        if FLAGS[name].value == "":
            what = "checkpoint" if name == "checkpoint_path" else "folder"
            raise ConfigError(f"--{name} is '', but must be the name of a {what}")


def _check_timeout():
    timeout_secs = FLAGS.timeout_secs
    if timeout_secs is None:
        return
    if not timeout_secs < float("inf"):
        raise ConfigError(
            f"--timeout_secs is {timeout_secs!r}, but must be finite; leave it out to "
            "wait for ever"
        )
    if FLAGS.run_once or FLAGS.checkpoint_path:
        name = "run_once" if FLAGS.run_once else "checkpoint_path"
        raise ConfigError(
            f"--timeout_secs is {timeout_secs!r}, but with --{name} nothing is waited for"
        )


def _check_exported():
    """A model that was exported has no checkpoints to choose from or to wait for."""
    of_checkpoints = ("checkpoint_path", "run_once", "timeout_secs", "eval_dir")
    for name in (*of_checkpoints, "divergence", "weight_ema"):
        if FLAGS.exported and FLAGS[name].present:
            raise ConfigError(
                f"--{name} is about the checkpoints of a run, but --exported measures "
                f"{FLAGS.exported}: leave one of them out"
            )


def _checkpoint_prefix():
    """--checkpoint_path, of whose files one may have been given, as a shell completes it."""
    path = FLAGS.checkpoint_path
    return path and re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path)


def prepare():
    """(folder of the run, checkpoint or None) that the flags name."""
    _check_names()
    _check_timeout()
    _check_exported()
    if FLAGS.weight_ema and FLAGS.divergence:
        raise ConfigError(
            "--divergence is about the weights themselves: leave out --weight_ema"
        )
    model_dir, checkpoint_path = FLAGS.model_dir, _checkpoint_prefix()
    if checkpoint_path and not FLAGS["model_dir"].present:
        model_dir = os.path.dirname(checkpoint_path) or "."
    return model_dir, checkpoint_path


def main(places):
    model_dir, checkpoint_path = places
    if FLAGS.exported:
        _print_exported(model_dir)
    else:
        _print_results(model_dir, checkpoint_path)


def _print_exported(model_dir):
    from bn_tf1.jobs.finished import exported_runs

    found = exported_runs.evaluate_exported(FLAGS.exported, model_dir, FLAGS.split)
    print(
        f"{found.path} ({found.format}): accuracy {found.accuracy:.4f}, loss "
        f"{found.loss:.4f} on {found.examples} {found.split} examples"
    )


def _print_results(model_dir, checkpoint_path):
    from bn_tf1.jobs import diagnosis, evaluation

    request = evaluation.Request(
        model_dir=model_dir,
        split=FLAGS.split,
        eval_dir=FLAGS.eval_dir,
        checkpoint_path=checkpoint_path,
        run_once=FLAGS.run_once,
        timeout_secs=FLAGS.timeout_secs,
        weight_ema=FLAGS.weight_ema,
    )
    for result in evaluation.evaluate(request):
        top5 = result.accuracy_top5
        print(
            f"step {result.step}: accuracy {result.accuracy:.4f}, "
            + ("" if top5 is None else f"top-5 accuracy {top5:.4f}, ")
            + f"loss {result.loss:.4f} on {result.examples} {result.split} examples",
            flush=True,
        )
        if FLAGS.divergence:
            print(diagnosis.diagnose(model_dir, result.checkpoint, result.split))


if __name__ == "__main__":
    define_flags()
    command_line.run(prepare, main, EXAMPLES)
