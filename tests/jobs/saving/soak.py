"""Kills a training job at random, again and again, and looks for anything that is lost.

    python -m tests.jobs.saving.soak --kills=50

One run is left alone. A second one, with the same flags, is killed by SIGKILL at random
moments and started again, while an evaluation job follows it. In the end

- every tensor of the two last checkpoints must be the same, bit for bit,
- every checkpoint that was there must have been measured once, or reported as skipped,
- nothing may be left in the folder that the other run does not have.

By hand, not in CI: 50 kills take some minutes, most of them for imports. Prints what it
found as one line of JSON; exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import tensorflow.compat.v1 as tf

from tests import ROOT

_SKIPPED = re.compile(r"skipped steps? ([\d, ]+): ")


def main():
    options = _options()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    alone, killed = folder / "alone", folder / "killed"
    print(f"in {folder}", flush=True)
    subprocess.check_call(_train(alone, options), stdout=subprocess.DEVNULL)
    seen = set()
    watching = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=[killed, seen, watching], daemon=True
    )
    watcher.start()
    evaluation = _start_evaluation(killed)
    kills = _train_with_kills(killed, options)
    output, errors = evaluation.communicate(timeout=600)
    watching.set()
    watcher.join()
    wrong = _different_tensors(alone, killed, options.steps)
    wrong += _lost_measurements(output, errors, seen, options.steps)
    wrong += _leftovers(alone, killed)
    if evaluation.returncode != 0:
        wrong.append(f"eval.py ended with {evaluation.returncode}: {errors[-500:]}")
    measured = len(_measured(output))
    summary = {"tensorflow": tf.version.VERSION, "kills": kills, "seen": len(seen)}
    print(json.dumps({**summary, "measured": measured, "wrong": wrong}))
    sys.exit(bool(wrong))


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--save_every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _train(model_dir, options):
    flags = {
        "model_dir": model_dir,
        "model": options.model,
        "batch_size": options.batch_size,
        "max_steps": options.steps,
        "save_checkpoint_steps": options.save_every,
        "log_steps": 1,
    }
    if options.model == "resnet":
        flags["resnet_n"] = 1  # others refuse it, since it does nothing there
    return _script("train.py", flags)


def _script(name, flags):
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    return [sys.executable, str(ROOT / name), *arguments]


def _start_evaluation(model_dir):
    return subprocess.Popen(
        _script("eval.py", {"model_dir": model_dir, "timeout_secs": 300}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _train_with_kills(model_dir, options):
    """Kills up to `options.kills` times, then lets the run end; returns how often."""
    chance = random.Random(options.seed)
    for kills in range(options.kills):
        process = subprocess.Popen(
            _train(model_dir, options), stdout=subprocess.PIPE, text=True
        )
        # Most kills hit the training, the others the start: locks, sweep, restore.
        if chance.random() < 0.8:
            # A first line may say where it resumes; the first step may be far.
            while process.stdout.readline().startswith("resuming"):
                pass
            time.sleep(chance.uniform(0, 1.0))
        else:
            time.sleep(chance.uniform(0, 8.0))
        process.kill()
        process.stdout.close()
        if process.wait() == 0:
            return kills
    subprocess.check_call(_train(model_dir, options), stdout=subprocess.DEVNULL)
    return options.kills


def _watch(model_dir, seen, done):
    """Collects the steps of all checkpoints that the state file ever names."""
    while not done.is_set():
        try:
            text = (model_dir / "checkpoint").read_text()
        except FileNotFoundError:
            text = ""
        seen.update(int(step) for step in re.findall(r"model\.ckpt-(\d+)", text))
        time.sleep(0.002)


def _different_tensors(alone, killed, step):
    readers = [
        tf.train.NewCheckpointReader(str(folder / f"model.ckpt-{step}"))
        for folder in (alone, killed)
    ]
    names = [set(reader.get_variable_to_shape_map()) for reader in readers]
    wrong = [f"only in one: {name}" for name in names[0] ^ names[1]]
    for name in names[0] & names[1]:
        values = [reader.get_tensor(name) for reader in readers]
        if values[0].tobytes() != values[1].tobytes():
            largest = np.max(np.abs(values[0] - values[1]))
            wrong.append(f"{name} differs by {largest}")
    return wrong


def _measured(output):
    return [int(step) for step in re.findall(r"^step (\d+):", output, re.MULTILINE)]


def _lost_measurements(output, errors, seen, last):
    measured = _measured(output)
    wrong = []
    if measured != sorted(set(measured)):
        wrong.append(f"not in order, each once: {measured}")
    skipped = {int(s) for steps in _SKIPPED.findall(errors) for s in steps.split(", ")}
    begun = {step for step in seen if measured and step > measured[0]}
    lost = sorted(begun - set(measured) - skipped)
    if lost:
        wrong.append(f"neither measured nor reported as skipped: {lost}")
    if not measured or measured[-1] != last:
        wrong.append(f"the last step was not measured: {measured[-1:]}")
    return wrong


def _leftovers(alone, killed):
    """What lies in `killed` besides evaluations and event files, but not in `alone`."""
    names = [
        {path.name for path in folder.iterdir() if "tfevents" not in path.name}
        for folder in (alone, killed)
    ]
    return [f"left over: {name}" for name in sorted(names[1] - names[0] - {"eval"})]


if __name__ == "__main__":
    main()
