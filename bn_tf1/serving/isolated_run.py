"""Runs, converts and writes graphs in a process of its own, with a time limit.

A foreign graph may wait for ever on an input queue, or end the process; a converter may
print what it likes. Here they do so elsewhere. The process is started early and serves
several requests: to start TensorFlow takes longer than most of them.

A request is a folder: steps.json, graphs and arrays; the answer is put beside them.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from typing import Any, Mapping, Sequence

import numpy as np

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class IsolatedError(ValueError):
    """A step failed, or did not end in time."""


class Isolated:
    """A process that takes steps; a context manager.

    Args:
        time_limit_secs: how long a request may take.
    """

    def __init__(self, time_limit_secs: float):
        self._limit = time_limit_secs
        self._steps: list[dict] = []
        self._arrays: list[Mapping[str, np.ndarray]] = []
        self._process: Any = None
        self._log: Any = None

    def __enter__(self):
        environment = dict(
            os.environ, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1"
        )
        paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # TensorFlow 1.15 looks for its converter to TFLite there.
        scripts = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        environment["PATH"] = os.pathsep.join(scripts)
        self._log = tempfile.TemporaryFile()  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def write(self, kind: str, graph: bytes, path: str, **options: Any) -> None:
        """A step: to write a graph in the format `kind`; see `model_formats`."""
        step = {"do": "write", "kind": kind, "graph": graph, "path": path, **options}
        self._steps.append(step)

    def run(
        self,
        kind: str,
        model: Any,
        feeds: Sequence[Mapping[str, np.ndarray]],
        outputs: Sequence[str],
    ) -> None:
        """A step: to run a path, or the bytes of a GraphDef, for each of `feeds`."""
        first = len(self._arrays)
        self._arrays += list(feeds)
        step = {"do": "run", "kind": kind, "outputs": list(outputs)}
        step["feeds"] = [first, len(self._arrays)]
        step["graph" if isinstance(model, bytes) else "path"] = model
        self._steps.append(step)

    def results(self) -> list[Any]:
        """Takes the steps. For each: the outputs of each feed; of what is written, None;
        an `IsolatedError` where it failed.

        Raises:
            IsolatedError: the steps did not end in time, or the process died.
        """
        steps, arrays = self._steps, self._arrays
        self._steps, self._arrays = [], []
        with tempfile.TemporaryDirectory() as folder:
            for number, step in enumerate(steps):
                if isinstance(step.get("graph"), bytes):
                    path = os.path.join(folder, f"graph-{number}.pb")
                    with open(path, "wb") as file:
                        file.write(step["graph"])
                    step["graph"] = path
            for number, feed in enumerate(arrays):
                _save(os.path.join(folder, f"feed-{number}"), feed)
            with open(_steps_file(folder), "w", encoding="utf-8") as file:
                json.dump(steps, file)
            self._ask(folder)
            return _answers(folder, steps)

    def _ask(self, folder):
        answer = b""
        try:
            self._process.stdin.write(folder.encode() + b"\n")
            self._process.stdin.flush()
            end = time.monotonic() + self._limit
            while not answer.endswith(b"\n"):
                left = max(end - time.monotonic(), 0)
                if not select.select([self._process.stdout], [], [], left)[0]:
                    raise IsolatedError(
                        f"the graph did not come back within {self._limit:g} seconds: "
                        "it may wait for an input that nobody gives: name its inputs, "
                        "or allow more time with `--time_limit`"
                    )
                part = os.read(self._process.stdout.fileno(), 100)
                if not part:
                    break
                answer += part
        except BrokenPipeError:
            pass  # it is dead: its code and last words follow
        if not answer:
            code = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().split("\n")
            raise IsolatedError(
                f"TensorFlow ended with code {code} on this graph: {lines[-1][:300]}"
            )


def _answers(folder, steps):
    with open(_errors_file(folder), encoding="utf-8") as file:
        errors = json.load(file)
    found: list[Any] = []
    for number, (step, error) in enumerate(zip(steps, errors)):
        if error is not None:
            found.append(IsolatedError(error))
        elif step["do"] == "write":
            found.append(None)
        else:
            runs = range(step["feeds"][1] - step["feeds"][0])
            paths = [os.path.join(folder, f"result-{number}-{r}") for r in runs]
            found.append([list(_load(path).values()) for path in paths])
    return found


def _steps_file(folder):
    return os.path.join(folder, "steps.json")


def _errors_file(folder):
    return os.path.join(folder, "errors.json")


def _save(path, arrays):
    """Arrays by name; names of tensors are no names of files."""
    numbered = {str(i): value for i, value in enumerate(arrays.values())}
    np.savez(path + ".npz", **numbered)
    with open(path + ".json", "w", encoding="utf-8") as file:
        json.dump(list(arrays), file)


def _load(path):
    with open(path + ".json", encoding="utf-8") as file:
        names = json.load(file)
    with np.load(path + ".npz", allow_pickle=False) as loaded:
        return {name: loaded[str(i)] for i, name in enumerate(names)}


# ------------------------------------------------------------------------- in the process


def main() -> None:
    """Takes the steps of the folders that standard input names, until it ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed is no answer
    from bn_tf1.serving import model_formats

    for line in sys.stdin:
        folder = line.rstrip("\n")
        with open(_steps_file(folder), encoding="utf-8") as file:
            steps = json.load(file)
        errors = []
        for number, step in enumerate(steps):
            try:
                _take(model_formats, folder, number, step)
                errors.append(None)
            # Whatever a foreign graph or a converter raises is told in one line.
            except Exception as error:  # noqa: BLE001
                errors.append(model_formats.explained(step, error))
        with open(_errors_file(folder), "w", encoding="utf-8") as file:
            json.dump(errors, file)
        answers.write(b"done\n")


def _take(model_formats, folder, number, step):
    if step["do"] == "write":
        model_formats.write(step)
        return
    feeds = [_load(os.path.join(folder, f"feed-{n}")) for n in range(*step["feeds"])]
    for run, outputs in enumerate(model_formats.run(step, feeds)):
        arrays = {str(i): np.asarray(value) for i, value in enumerate(outputs)}
        _save(os.path.join(folder, f"result-{number}-{run}"), arrays)


if __name__ == "__main__":
    main()
