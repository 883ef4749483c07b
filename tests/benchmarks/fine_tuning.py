"""The cases of fine-tuning, each with the choices that one has: accuracy on images of tests.

python -m tests.benchmarks.fine_tuning            # minutes

A network that knows the digits 0 to 4 is tuned to the digits 5 to 9, with other images of
them for tests. All is made of the digits that come with the project, as image folders.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs.config import Config
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.evaluation import Request, evaluate
from bn_tf1.jobs.training import train

_SEEDS = range(5)
_ANEW = "logits"
_MOVING = {"bn_normalize_with": "moving"}
_FROZEN = {**_MOVING, "bn_train_affine": False, "train_only": _ANEW}
_CHOICES = {
    "nothing": {},
    "--bn_normalize_with=moving": _MOVING,
    "frozen backbone": _FROZEN,
    "--nobn_update": {"bn_update": False},
}
# Case: (which folder, options). The rates are those of the default batch, scaled to it.
_CASES = {
    "5 images of each class": (
        "few",
        {"batch_size": 25, "max_steps": 100, "learning_rate": 0.03},
    ),
    "batches of 2": (
        "many",
        {"batch_size": 2, "max_steps": 500, "learning_rate": 0.003},
    ),
    "many images, batches of 32": (
        "many",
        {"batch_size": 32, "max_steps": 200, "learning_rate": 0.05},
    ),
    "many, dark for light": (
        "dark",
        {"batch_size": 32, "max_steps": 200, "learning_rate": 0.05},
    ),
}


def main() -> None:
    tf.disable_v2_behavior()
    with tempfile.TemporaryDirectory() as root:
        _make_folders(root)
        _trained(root, "backbone", "known", max_steps=300)
        known = os.path.join(root, "backbone", "model.ckpt-300")
        print("| | " + " | ".join([*_CHOICES, "no checkpoint"]) + " |")
        for case, (folder, options) in _CASES.items():
            tuned = {"init_checkpoint": known, "init_exclude": _ANEW, **options}
            runs = [{**tuned, **choice} for choice in _CHOICES.values()]
            cells = [_accuracies(root, folder, run) for run in [*runs, options]]
            print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


def _accuracies(root, folder, options):
    """Mean and range over some seeds, in percent."""
    found = [
        100 * _trained(root, f"{folder}-{len(os.listdir(root))}", folder, **options)
        for options in ({**options, "seed": seed} for seed in _SEEDS)
    ]
    return f"{np.mean(found):.0f} ({min(found):.0f} to {max(found):.0f})"


def _trained(root, run, folder, **options):
    config = Config(
        dataset="images",
        data_dir=os.path.join(root, folder),
        image_size=16,
        model_dir=os.path.join(root, run),
        log_steps=10**6,
        **options,
    )
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        train(config)
        (result,) = evaluate(Request(model_dir=config.model_dir, run_once=True))
    return result.accuracy


def _make_folders(root):
    for split in ("train", "test"):
        images, labels = _digits(split)
        for folder, classes, per_class, sign in (
            ("known", range(5), None, 1),
            ("few", range(5, 10), 5 if split == "train" else None, 1),
            ("many", range(5, 10), None, 1),
            ("dark", range(5, 10), None, -1),
        ):
            for label in classes:
                chosen = np.flatnonzero(labels == label)[:per_class]
                _write(
                    os.path.join(root, folder, split, str(label)), images[chosen], sign
                )


def _digits(split):
    dataset = datasets.open_dataset("digits", split)
    with tf.Graph().as_default(), tf.Session() as session:
        batches = datasets.evaluation_batches(dataset, dataset.num_examples)
        iterator = tf.data.make_initializable_iterator(batches)
        batch = iterator.get_next()
        session.run(iterator.initializer)
        return session.run(batch)


def _write(folder, images, sign):
    os.makedirs(folder)
    pixels = (images if sign > 0 else 1 - images) * 255
    with tf.Graph().as_default(), tf.Session() as session:
        pngs = tf.map_fn(
            tf.image.encode_png, tf.cast(pixels, tf.uint8), dtype=tf.string
        )
        for number, png in enumerate(session.run(pngs)):
            with open(os.path.join(folder, f"{number}.png"), "wb") as file:
                file.write(png)


if __name__ == "__main__":
    main()
