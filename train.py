"""Trains an image classifier with batch normalization.

Without a flag it trains on the digits that come with the project. Run again, it
resumes from the newest checkpoint in --model_dir.
"""

import os
import shlex
import sys

# Read by bn_tf1, which then leaves it to this program when TensorFlow is imported.
IMPORTS_TENSORFLOW_ITSELF = True

from bn_tf1 import quiet_start

with quiet_start.importing(verbose=quiet_start.is_verbose(sys.argv)):
    from bn_tf1.jobs import config
    from bn_tf1.jobs.process import command_line

EXAMPLES = (
    "",
    "--model=resnet --model_dir=runs/resnet",
    "--dataset=mnist --data_dir=FOLDER --model_dir=runs/mnist",
    "--model_dir=runs/mnist --max_steps=2000   # goes on",
    "--worker_hosts=a:2222,b:2222 --task_index=0",
)


def prepare():
    return config.resolve(command_line.given())


def main(run):
    from bn_tf1.jobs import training

    workers = command_line.workers()
    result = training.train(run, workers)
    if workers is not None and not workers.is_chief:
        return
    if result.loss is None:
        print(
            f"nothing to do: the run in {run.model_dir} is at step {result.step}, its last "
            f"one; to go on, give a larger one, such as --max_steps={2 * result.step}"
        )
    else:
        print(
            f"done: step {result.step}, loss {result.loss:.4f}, {result.seconds:.1f} "
            "seconds"
        )
        print(f"curves in {_report(run.model_dir)}; evaluate with:")
        print(_evaluation(run.model_dir))


def _report(model_dir):
    from bn_tf1.jobs.reporting import run_page

    return os.path.join(model_dir, run_page.REPORT_FILE)


def _evaluation(model_dir):
    """The command line that evaluates the run, as it can be typed here."""
    script = os.path.join(os.path.dirname(sys.argv[0]), "eval.py")
    words = [*command_line.interpreter(), script, f"--model_dir={model_dir}"]
    return " ".join(map(shlex.quote, [*words, "--run_once"]))


if __name__ == "__main__":
    command_line.define_options()
    command_line.define_workers()
    command_line.run(prepare, main, EXAMPLES)
