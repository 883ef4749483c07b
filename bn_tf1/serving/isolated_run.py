"""Runs, converts and writes graphs in a process of its own, with a time limit.

A foreign graph may wait for ever on an input queue, or end the process; a converter may
print what it likes. Here they do so elsewhere. The process is started early and serves
several steps: to start TensorFlow takes longer than most of them.

A step is a folder: step.json, a graph and arrays; the answer is put beside them.
"""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from typing import Any, Mapping, Sequence

import numpy as np

from bn_tf1.serving.export_error import ExportError

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class IsolatedError(ExportError):
    """A step failed, or did not end in time."""


class Isolated:
    """A process that takes steps; a context manager.

    Args:
        time_limit_secs: how long a step may take.
    """

    def __init__(self, time_limit_secs: float):
        self._limit = time_limit_secs
        self._process: Any = None
        self._is_ready = False
        self._log: Any = None

    def __enter__(self):
        self._log = tempfile.TemporaryFile()  # closed at the end
        self._start()
        return self

    def _start(self):
        environment = dict(
            os.environ, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1"
        )
        paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # TensorFlow 1.15 looks for its converter to TFLite there.
        scripts = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        environment["PATH"] = os.pathsep.join(scripts)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._is_ready = False

    def __exit__(self, *error: object) -> None:
        self._end()
        self._log.close()

    def _end(self):
        self._process.kill()
        self._process.communicate()

    def write(self, kind: str, graph: Any, path: str, **options: Any) -> None:
        """Writes an `EditableGraph` in the format `kind`; see `model_formats`.

        Raises:
            IsolatedError: that failed.
        """
        step = {"do": "write", "kind": kind, "path": path, **options}
        self._take(step, graph, feeds=())

    def run(
        self,
        model: Any,
        feeds: Sequence[Mapping[str, np.ndarray]],
        outputs: Sequence[str],
        *,
        kind: str = "frozen",
        as_written: bool = False,
    ) -> list[list[np.ndarray]]:
        """The outputs of a model for each of `feeds`.

        Args:
            model: the path of a model, or an `EditableGraph`.
            feeds: arrays by name of an input, or of any other tensor of a graph.
            outputs: names of tensors.
            kind: see `model_formats`.
            as_written: whether TensorFlow runs a graph without optimising it.

        Raises:
            IsolatedError: it failed, did not end in time, or the process died.
        """
        step = {"do": "run", "kind": kind, "outputs": list(outputs)}
        step["as_written"] = as_written
        if isinstance(model, str):
            return self._take(dict(step, path=model), None, feeds)
        return self._take(step, model, feeds)

    def _take(self, step, graph, feeds):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            if graph is not None:
                file = folder / "graph.pb"
                file.write_bytes(graph.portable_graph_def().SerializeToString())
                step["graph"] = str(file)
            for number, feed in enumerate(feeds):
                _save(folder / f"feed-{number}", feed)
            (folder / "step.json").write_text(json.dumps(dict(step, feeds=len(feeds))))
            self._ask(name)
            error = json.loads((folder / "error.json").read_text())
            if error is not None:
                raise IsolatedError(error)
            results = (_load(folder / f"result-{n}") for n in range(len(feeds)))
            return [list(result.values()) for result in results]

    def _ask(self, folder):
        if self._process.poll() is not None:  # of the step before
            self._end()
            self._start()
        try:
            if not self._is_ready:  # to start is not the graph's fault, however long
                self._line(None)
                self._is_ready = True
            self._process.stdin.write(folder.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._line(time.monotonic() + self._limit)
        except BrokenPipeError:
            answer = b""  # it is dead: its code and last words follow
        if not answer:
            code = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().split("\n")
            raise IsolatedError(
                f"TensorFlow ended with code {code} on this graph: {lines[-1][:300]}"
            )

    def _line(self, end):
        """A line that the process says until `end`; empty when it is dead."""
        answer = b""
        while not answer.endswith(b"\n"):
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                # What it would say later is no answer to the next step.
                self._process.kill()
                self._process.wait()
                raise IsolatedError(
                    f"the graph did not come back within {self._limit:g} seconds: it may "
                    "wait for an input that nobody gives: name its inputs, or allow more "
                    "time with `--time_limit`"
                )
            part = os.read(self._process.stdout.fileno(), 100)
            if not part:
                return b""
            answer += part
        return answer


def _save(path, arrays):
    """Arrays by name; names of tensors are no names of files."""
    numbered = {}
    for number, value in enumerate(arrays.values()):
        # Strings are objects in TensorFlow, which a file would hold as pickles.
        is_text = value.dtype == object
        numbered[str(number)] = _encoded(value) if is_text else value
    np.savez(f"{path}.npz", names=np.array(list(arrays), str), **numbered)


def _encoded(text):
    """Text as TensorFlow takes it: NumPy's own way to bytes knows ASCII alone."""
    parts = [t if isinstance(t, bytes) else str(t).encode() for t in text.flat]
    return np.array(parts, bytes).reshape(text.shape)


def _load(path):
    with np.load(f"{path}.npz", allow_pickle=False) as loaded:
        return {str(name): loaded[str(i)] for i, name in enumerate(loaded["names"])}


# ------------------------------------------------------------------------- in the process


def main() -> None:
    """Takes the step of each folder that standard input names, until that ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed is no answer
    from bn_tf1.serving import model_formats

    answers.write(b"ready\n")
    for line in sys.stdin:
        folder = pathlib.Path(line.rstrip("\n"))
        step, error = json.loads((folder / "step.json").read_text()), None
        try:
            _take(model_formats, folder, step)
        # Whatever a foreign graph or a converter raises is told in one line.
        except Exception as raised:  # noqa: BLE001
            error = model_formats.explained(step, raised)
        (folder / "error.json").write_text(json.dumps(error))
        answers.write(b"done\n")


def _take(model_formats, folder, step):
    if step["do"] == "write":
        model_formats.write(step)
        return
    feeds = [_load(folder / f"feed-{number}") for number in range(step["feeds"])]
    for number, outputs in enumerate(model_formats.run(step, feeds)):
        arrays = {str(i): np.asarray(value) for i, value in enumerate(outputs)}
        _save(folder / f"result-{number}", arrays)


if __name__ == "__main__":
    main()
