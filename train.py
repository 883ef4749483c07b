"""Trains an image classifier with batch normalization. `--help` lists the flags.

Without a flag it trains on the digits that come with the project. Run again, it resumes
from the newest checkpoint in --model_dir.
"""

import gc
import os
import signal

# Read by bn_tf1, which then leaves it to this program when TensorFlow is imported.
IMPORTS_TENSORFLOW_ITSELF = True
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Until `command_line.run`: imports take seconds, and Python would print a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)
# Until then, too: TensorFlow's import makes much that lives for ever, and looking through
# it for garbage takes an eighth of the time.
gc.disable()

import dataclasses

from absl import flags

from bn_tf1.jobs import command_line, config, training


def define_flags():
    """One flag for each field of `Config`, with its default and help."""
    define = {
        bool: flags.DEFINE_boolean,
        float: flags.DEFINE_float,
        int: flags.DEFINE_integer,
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(config.Config):
        choices = field.metadata["choices"]
        text = field.metadata["help"]
        if choices:
            text += f" One of: {', '.join(choices)}."
        define[field.metadata["kind"]](field.name, field.default, text)
    flags.DEFINE_alias("train_dir", "model_dir")


def main():
    given = {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(config.Config)
        if flags.FLAGS[field.name].present
    }
    run = config.resolve(given)
    result = training.train(run)
    loss = "" if result.loss is None else f"loss {result.loss:.4f}, "
    print(
        f"done: step {result.step}, {loss}{result.seconds:.1f} seconds; evaluate with: "
        f"python eval.py --model_dir={run.model_dir} --run_once"
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
