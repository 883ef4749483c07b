"""Checkpoints that survive kills, crashes, full disks, bad bytes and NaN.

TensorFlow's Saver writes and reads the tensors; this module adds what it lacks:

- Commit. `CommittingSaver` lets the Saver write into a folder of its own, reads every
  tensor back (TensorFlow checks the checksums while it reads), refuses values that are
  not finite, and calls fsync. Only then the files take their names, the index last:
  where `model.ckpt-<step>.index` is, there was a complete checkpoint. The file
  `checkpoint`, which names the newest one, is replaced at once and at the very end,
  after `saved_steps` has noted the step.
- Recovery. `recover` sweeps what a killed process left behind, finds the newest
  checkpoint that can be read, and writes the file `checkpoint` anew if it is missing,
  damaged, or names another one.

Contract: files with other names than the training job's own are never touched. `recover`
and `CommittingSaver` want the folder for themselves (see `run_lock`); `listed` and
`verify` do not. A checkpoint that cannot be used is never passed over in silence.

Source: what TensorFlow does by itself was measured on 1.15.5 and 2.21; in part it is
described in tensorflow/tensorflow#15844, #16293 and #39033.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import sys
from concurrent import futures
from typing import Iterable, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf
from google.protobuf import text_format

from bn_tf1.checkpoints.reader_writer import CheckpointError, first_line
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.jobs.saving import durable_files, saved_steps

STATE_FILE = "checkpoint"
PREFIX = "model.ckpt"

# What TensorFlow raises for a damaged or missing file, on one version or the other:
# 2.21's reader has a bare IndexError and RuntimeError among them.
READ_ERRORS = (tf.errors.OpError, ValueError, IndexError, RuntimeError, OSError)

_STEP_NAME = tf.GraphKeys.GLOBAL_STEP

_OWN_FILE = re.compile(r"model\.ckpt-(\d+)\.(index|meta|data-\d{5}-of-\d{5})")
_LEFTOVERS = re.compile(
    # of this module
    r"model\.ckpt-\d+\.partial"
    r"|(checkpoint|config\.json|saved_steps\.txt|train\.holder|report\.html)"
    r"\.partial"
    # of TensorFlow: its folder for a save, an index half-way, a text file half-way
    r"|model\.ckpt-\d+_temp(_[0-9a-f]{32})?"
    r"|model\.ckpt-\d+\.(index|data-\d{5}-of-\d{5})\.tempstate\d+"
    r"|(checkpoint|graph\.pbtxt|model\.ckpt-\d+\.meta)\.tmp[0-9a-f]{32}"
)
# A state file of ten thousand checkpoints is smaller.
_MAX_STATE_BYTES = 1 << 20


class SavingError(RuntimeError):
    """A checkpoint cannot be saved, or none of those that are there can be used."""


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or damaged, or a value in it is not finite.

    Attributes:
        reason: str, the message without the path of the checkpoint.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class SavedCheckpoint(NamedTuple):
    """A checkpoint by its name; whether it can be read, `verify` tells.

    Attributes:
        step: the global step, from the name; 0 for a name without a number.
        path: the path without `.index`.
    """

    step: int
    path: str


def listed(model_dir: str) -> list[SavedCheckpoint]:
    """The checkpoints of a folder, the newest last.

    They are those that the file `checkpoint` names. Where it is missing, empty or
    garbage they are the training job's own with an index, in the order of their steps.
    """
    named = _named_by_state(model_dir)
    return _with_index(model_dir) if named is None else named


def verify(path: str) -> None:
    """Reads every tensor of a checkpoint, and with it every checksum.

    A `global_step` in it must be that of the name: files of another checkpoint may have
    been put in the place of these. `path` is that without `.index`.

    Raises:
        DamagedCheckpoint: something cannot be read or is not finite; the message begins
            with `path`, and names the file or the tensor.
    """
    _check_files(path)
    try:
        # All of them: TensorFlow holds against a checksum what it reads, and nothing else.
        reader = tf.train.NewCheckpointReader(path)
        names = sorted(reader.get_variable_to_shape_map())
        for name in names:
            value = reader.get_tensor(name)
            if _is_floating(value) and not np.all(np.isfinite(value)):
                raise DamagedCheckpoint(path, f"tensor {name} is not finite")
            if name == _STEP_NAME:
                _check_step(path, value)
    except DamagedCheckpoint:
        raise
    except READ_ERRORS as error:
        raise DamagedCheckpoint(path, _damage(path, error)) from error
    if not names:
        raise DamagedCheckpoint(path, f"there is no tensor in {path}.index")


def _check_files(path):
    # A named pipe would be waited for without end, by TensorFlow and by us.
    for name in [path + ".index", *glob.glob(glob.escape(path) + ".data-*")]:
        if os.path.exists(name) and not os.path.isfile(name):
            raise DamagedCheckpoint(path, f"{name} is no regular file")


def _check_step(path, global_step):
    # With index and data of step 6 under the names of step 9 every checksum is right, and a
    # run would go on from a step 9 that never was. Other people's names tell no step.
    named = _step_of(os.path.basename(path) + ".index")
    if named is not None and not np.array_equal(global_step, named):
        raise DamagedCheckpoint(path, f"tensor {_STEP_NAME} is {global_step}")


def check_fits(checkpoint: SavedCheckpoint, variables: Iterable[tf.Variable]) -> None:
    """Compares the variables of a graph with a checkpoint that `recover` found.

    Raises:
        SavingError: a variable is missing in it, or has another shape there.
    """
    saved = tf.train.NewCheckpointReader(checkpoint.path).get_variable_to_shape_map()
    for variable in variables:
        name, shape = variable.op.name, variable.shape.as_list()
        if saved.get(name) != shape:
            there = f"has it as {saved[name]}" if name in saved else "does not have it"
            raise SavingError(
                f"the network has {name} of shape {shape}, but {checkpoint.path} "
                f"{there}: give the flags that the run began with (they are in its "
                "config.json), or choose another --model_dir"
            )


def recover(model_dir: str, argument: str = "--model_dir") -> SavedCheckpoint | None:
    """Puts a folder in order after whatever happened, and finds where to go on.

    Messages call it `argument`.

    Returns:
        The newest checkpoint that can be used, which `checkpoint` names from now on;
        None where no run has saved anything yet.

    Raises:
        SavingError: there were checkpoints, but none can be used.
        OSError: the folder cannot be read or written.
    """
    _sweep(model_dir)
    named = _named_by_state(model_dir)
    own = _with_index(model_dir)
    # Both: the state file may name a checkpoint of another program, or be older than a
    # commit that was killed before it was written.
    candidates = sorted({*own, *(named or [])}, reverse=True)
    newest = next(filter(_is_usable, candidates), None)
    if newest is None:
        _refuse_if_something_was_saved(model_dir, candidates, argument)
        return None
    usable = [c for c in own if c.step < newest.step] + [newest]
    # Those of a commit that was killed half-way, or of an older version's run.
    saved_steps.record(model_dir, [c.step for c in own + usable])
    if usable != named:
        _write_state(model_dir, usable)
    # Data whose index never came: the newest may be a torn commit, older ones cannot
    # be anything else than remains of a removal.
    keep = {c.step for c in own + usable}
    _remove_own(model_dir, lambda step: step not in keep)
    return newest


def remove_start(model_dir: str) -> None:
    """Removes the checkpoint of step 0, for a run that saved no other one.

    Whenever it is killed, `recover` finds that checkpoint or none.
    """
    # Its files last: a state file or a note of steps without them would be refused as a loss.
    for name in (STATE_FILE, saved_steps.FILE):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(model_dir, name))
    _remove_own(model_dir, lambda step: step == 0)


class CommittingSaver(tf.train.Saver):
    """A Saver of all variables whose checkpoints are complete, finite and durable.

    It takes over what `tf.train.Saver` does after the tensors are written: the file
    `checkpoint` and the removal of old checkpoints.
    """

    def __init__(self, model_dir: str, keep: int, newest: SavedCheckpoint | None):
        """Builds the operations in the default graph.

        Args:
            model_dir: the folder for the checkpoints; if it is there already, no other
                one may take its place.
            keep: how many of the newest to keep; 0 keeps all.
            newest: what `recover` returned; it is not saved a second time.
        """
        # TensorFlow's own removal knows nothing of what earlier processes saved.
        super().__init__(max_to_keep=None)
        self._model_dir = model_dir
        self._identity = _identity(model_dir)
        self._keep = keep
        self._newest = newest

    def save(self, sess, save_path, global_step=None, **options) -> str:
        """Saves the variables as the checkpoint of `global_step`.

        The signature is that of `tf.train.Saver.save`.

        Returns:
            The path of the checkpoint.

        Raises:
            SavingError: a value is not finite or the files cannot be written; the
                earlier checkpoints are as they were.
        """
        step = int(global_step)
        path = os.path.join(self._model_dir, f"{PREFIX}-{step}")
        # A run saves once more when it resumes.
        if self._newest != SavedCheckpoint(step, path):
            try:
                self._commit(sess, SavedCheckpoint(step, path))
            # OpError: among others OutOfRangeError for a limit on the file size.
            except READ_ERRORS as error:
                is_damaged = isinstance(error, DamagedCheckpoint)
                reason = error.reason if is_damaged else _in_one_line(error)
                raise SavingError(
                    f"the checkpoint of step {step} cannot be saved in "
                    f"{self._model_dir}: {reason}; earlier checkpoints are as they were"
                ) from error
            self._newest = SavedCheckpoint(step, path)
        return path

    def _commit(self, sess, checkpoint):
        # In another one, neither the lock is held nor are the earlier checkpoints. A saver
        # may be made before its folder: then any folder is the run's.
        if self._identity and _identity(self._model_dir) not in (self._identity, None):
            raise OSError("another folder has taken the place of the run's")
        folder = checkpoint.path + durable_files.PARTIAL
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        try:
            # Without a state file, which TensorFlow writes before anything was read back.
            staged = super().save(
                sess,
                os.path.join(folder, PREFIX),
                global_step=checkpoint.step,
                write_state=False,
            )
            # The disk is waited for while the processor checks what was written.
            with futures.ThreadPoolExecutor(max_workers=1) as pool:
                synced = pool.submit(_sync_files, folder)
                verify(staged)
                synced.result()
            # A damaged predecessor of the same step must not lend its index to this.
            _remove_own(self._model_dir, lambda step: step == checkpoint.step)
            _move(folder, self._model_dir)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        earlier = [c for c in listed(self._model_dir) if c.step < checkpoint.step]
        kept = (earlier + [checkpoint])[-self._keep :]  # of [-0:] all
        # Noted before it is named, removed after it is no longer: whoever reads meanwhile
        # finds what is named, and knows what came and went.
        saved_steps.record(self._model_dir, [c.step for c in kept])
        _write_state(self._model_dir, kept)
        if self._keep:
            # Also those that were passed over as damaged, which nobody lists any more.
            keep = {c.step for c in kept}
            _remove_own(
                self._model_dir, lambda s: s < checkpoint.step and s not in keep
            )


def _identity(folder):
    """What tells a folder from another of the same name; None if there is none."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_floating(value):
    dtype = tf.as_dtype(value.dtype)
    return dtype.is_floating or dtype.is_complex


def _damage(path, error):
    """What is wrong with the files, in plain words where our own reader sees it."""
    index, data = path + ".index", path + ".data-00000-of-00001"
    if not os.path.exists(index):
        return f"there is no {index}"  # removed meanwhile
    try:
        open_tensors(path)
    except CheckpointError as plain:
        return first_line(plain)
    if isinstance(error, tf.errors.NotFoundError) and not os.path.exists(data):
        return f"there is no {data}"
    return _in_one_line(error)


def _in_one_line(error):
    return f"{first_line(error)} ({type(error).__name__})"


def _is_usable(checkpoint):
    """Whether it can be read; says on stderr why not."""
    try:
        verify(checkpoint.path)
    except DamagedCheckpoint as error:
        print(
            f"warning: damaged checkpoint, passed over: {error}; "
            "later saves may remove its files",
            file=sys.stderr,
        )
        return False
    return True


def _refuse_if_something_was_saved(model_dir, candidates, argument):
    """Starting at step 0 is right only where no checkpoint was ever complete."""
    # Killed in its first save, a run leaves files of step 0 and names none.
    later = any(step != 0 for step in saved_steps.read(model_dir))
    remains = [c.path for c in candidates] or [
        os.path.join(model_dir, name)
        for name in sorted(os.listdir(model_dir))
        if name == STATE_FILE
        or _step_of(name) not in (None, 0)
        or (name == saved_steps.FILE and later)
    ]
    if remains:
        raise SavingError(
            f"{argument} is {model_dir!r}, but no checkpoint in it can be used: "
            f"{', '.join(remains)}; put a good copy back, or choose another "
            f"{argument} to begin at step 0"
        )


def _named_by_state(model_dir) -> list[SavedCheckpoint] | None:
    """What the file `checkpoint` names, the newest last; None if it is no such file."""
    path = os.path.join(model_dir, STATE_FILE)
    try:
        # TensorFlow would read a pipe without end, and a file of any size into memory.
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_STATE_BYTES:
            return None
        state = tf.train.get_checkpoint_state(model_dir)
    except (OSError, ValueError):
        return None
    # Garbage may parse as text with a null byte, of which a path cannot be made.
    if state is None or "\0" in state.model_checkpoint_path:
        return None
    newest = state.model_checkpoint_path
    paths = [
        p for p in state.all_model_checkpoint_paths if p != newest and "\0" not in p
    ]
    return [_checkpoint_at(model_dir, path) for path in paths + [newest]]


def _checkpoint_at(model_dir, path):
    folder, name = os.path.split(path)
    # A state file with whole paths may say another name of this folder, by a link.
    if os.path.realpath(folder) == os.path.realpath(model_dir):
        path = os.path.join(model_dir, name)
    number = re.search(r"-(\d+)$", name)
    return SavedCheckpoint(int(number.group(1)) if number else 0, path)


def _write_state(model_dir, checkpoints):
    # Names relative to the folder move with it. Of another folder's the whole path is
    # written: behind a symbolic link ".." leads elsewhere.
    names = []
    for _, path in checkpoints:
        name = os.path.basename(path)
        is_own = os.path.join(model_dir, name) == path
        names.append(name if is_own else os.path.abspath(path))
    # TensorFlow takes names as they are where the folder's is absolute. It is not asked to
    # write them: tf.train.update_checkpoint_state does not wait for the disk.
    state = tf.train.generate_checkpoint_state_proto(
        os.path.abspath(model_dir), names[-1], names
    )
    text = text_format.MessageToString(state)
    durable_files.replace_text(os.path.join(model_dir, STATE_FILE), text)


def _step_of(name) -> int | None:
    """The step of a file of the training job's checkpoints; None for other files."""
    match = _OWN_FILE.fullmatch(name)
    return int(match.group(1)) if match else None


def _names(model_dir):
    try:
        return sorted(os.listdir(model_dir))
    except FileNotFoundError:
        return []


def _with_index(model_dir) -> list[SavedCheckpoint]:
    """The training job's own checkpoints that have an index, the newest last."""
    # The index takes its name last, and loses it first: without it there is no checkpoint.
    steps = [_step_of(name) for name in _names(model_dir) if name.endswith(".index")]
    return [
        SavedCheckpoint(step, os.path.join(model_dir, f"{PREFIX}-{step}"))
        for step in sorted(step for step in steps if step is not None)
    ]


def _sweep(model_dir):
    """Removes what a killed process left half-way, its own and TensorFlow's."""
    for name in _names(model_dir):
        path = os.path.join(model_dir, name)
        if _LEFTOVERS.fullmatch(name):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)


def _remove_own(model_dir, is_superfluous):
    """Removes the job's own checkpoints whose step is superfluous."""
    # The index first: what a kill leaves then is no checkpoint, and is swept.
    for name in _index_first(_names(model_dir)):
        step = _step_of(name)
        if step is not None and is_superfluous(step):
            os.remove(os.path.join(model_dir, name))


def _sync_files(folder):
    for name in os.listdir(folder):
        durable_files.sync(os.path.join(folder, name))


def _move(source, target):
    """Moves the files of a checkpoint, the index last: where it is, the rest is."""
    for name in _index_first(os.listdir(source))[::-1]:
        os.replace(os.path.join(source, name), os.path.join(target, name))
    durable_files.sync(target)


def _index_first(names):
    return sorted(names, key=lambda name: not name.endswith(".index"))
