"""Checkpoints: what is verified, listed, recovered, committed and swept."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bn_tf1.jobs.saving import committing_saver, saved_steps
from bn_tf1.jobs.saving.committing_saver import (
    CommittingSaver,
    DamagedCheckpoint,
    SavedCheckpoint,
    SavingError,
)

_NAMES = ("index", "meta", "data-00000-of-00001")
_OTHERS = {"checkpoint", "saved_steps.txt"}


class Run:
    """A folder with the checkpoints of a run of one matrix and one counter."""

    def __init__(self, folder, keep=5):
        self.folder = str(folder)
        with tf.Graph().as_default():
            self.weights = tf.get_variable(
                "weights", [20, 30], initializer=tf.ones_initializer()
            )
            self.global_step = tf.train.get_or_create_global_step()
            self.saver = CommittingSaver(self.folder, keep, newest=None)
            self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())

    def save(self, *steps):
        for step in steps:
            self.weights.load(np.full([20, 30], step, np.float32), self.session)
            self.global_step.load(step, self.session)
            self.saver.save(self.session, "unused", global_step=step)

    def path(self, step):
        return os.path.join(self.folder, f"model.ckpt-{step}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 0, 3 and 6, for reading only."""
    run = Run(tmp_path_factory.mktemp("saved"))
    run.save(0, 3, 6)
    run.session.close()
    return run.folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`, to be damaged."""
    shutil.copytree(saved, str(tmp_path / "run"))
    return tmp_path / "run"


def _file(folder, step, kind):
    return folder / f"model.ckpt-{step}.{kind}"


def _steps(model_dir):
    return [checkpoint.step for checkpoint in committing_saver.listed(str(model_dir))]


def _tree(folder):
    return {
        str(path.relative_to(str(folder))): path.read_bytes()
        if path.is_file()
        else None
        for path in pathlib.Path(str(folder)).rglob("*")
    }


# Commit


def test_a_commit_leaves_the_files_of_a_saver_and_nothing_else(saved):
    expected = {f"model.ckpt-{step}.{kind}" for step in (0, 3, 6) for kind in _NAMES}
    assert set(os.listdir(saved)) == expected | _OTHERS


def test_tensorflow_itself_finds_and_reads_what_was_committed(saved):
    newest = tf.train.latest_checkpoint(saved)
    assert newest == os.path.join(saved, "model.ckpt-6")
    state = tf.train.get_checkpoint_state(saved)
    assert [path[-1] for path in state.all_model_checkpoint_paths] == ["0", "3", "6"]
    weights = tf.train.NewCheckpointReader(newest).get_tensor("weights")
    np.testing.assert_array_equal(weights, np.full([20, 30], 6, np.float32))


def test_a_moved_folder_keeps_its_checkpoints(folder):
    moved = folder.parent / "moved"
    folder.rename(moved)
    assert committing_saver.recover(str(moved)).path == str(moved / "model.ckpt-6")


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [6, 9]), (0, [0, 3, 6, 9])])
def test_the_newest_are_kept_and_zero_keeps_all(tmp_path, keep, left):
    run = Run(tmp_path, keep)
    run.save(0, 3, 6, 9)
    assert _steps(tmp_path) == left
    indices = {path.name for path in tmp_path.glob("*.index")}
    assert indices == {f"model.ckpt-{step}.index" for step in left}


def test_what_was_restored_is_not_saved_again(folder, monkeypatch):
    newest = committing_saver.recover(str(folder))
    tf.get_variable("weights", [2])
    saver = CommittingSaver(str(folder), 5, newest)
    before = _tree(folder)
    with tf.Session() as session:
        saver.save(session, "unused", global_step=np.int64(6))
    assert _tree(folder) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_and_never_becomes_the_newest(
    tmp_path, value
):
    run = Run(tmp_path)
    run.save(0)
    before = _tree(tmp_path)
    weights = np.ones([20, 30], np.float32)
    weights[19, 29] = value
    run.weights.load(weights, run.session)
    run.global_step.load(7, run.session)
    with pytest.raises(SavingError, match="of step 7 .*tensor weights is not fin"):
        run.saver.save(run.session, "unused", global_step=7)
    assert _tree(tmp_path) == before


def test_a_save_that_is_damaged_on_its_way_to_the_disk_is_found(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(0)
    before = _tree(tmp_path)
    save = tf.train.Saver.save

    def save_and_damage(saver, session, path, **options):
        path = save(saver, session, path, **options)
        _flip(pathlib.Path(path + ".data-00000-of-00001"), 100)
        return path

    monkeypatch.setattr(tf.train.Saver, "save", save_and_damage)
    with pytest.raises(SavingError, match="checkpoint of step 3 cannot be saved"):
        run.save(3)
    assert _tree(tmp_path) == before


def test_a_commit_of_the_step_of_a_damaged_checkpoint_replaces_it(folder):
    _file(folder, 6, "data-00000-of-00001").write_bytes(b"")
    assert committing_saver.recover(str(folder)).step == 3
    run = Run(folder)
    run.save(6)
    committing_saver.verify(run.path(6))
    assert _steps(folder) == [0, 3, 6]


def test_a_folder_that_is_gone_is_an_error_and_is_not_made_again(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(SavingError, match=r"of step 3 cannot be saved in .*run: "):
        run.save(3)
    assert not (tmp_path / "run").exists()


# Verification


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(bytes(content))


_DAMAGES = {
    "data truncated": lambda f: _truncate(_file(f, 6, "data-00000-of-00001"), 0.5),
    "data empty": lambda f: _truncate(_file(f, 6, "data-00000-of-00001"), 0),
    "data zeroed": lambda f: _zero(_file(f, 6, "data-00000-of-00001")),
    "data bit flipped": lambda f: _flip(_file(f, 6, "data-00000-of-00001"), 1234),
    "data missing": lambda f: _file(f, 6, "data-00000-of-00001").unlink(),
    "index truncated": lambda f: _truncate(_file(f, 6, "index"), 0.5),
    "index empty": lambda f: _truncate(_file(f, 6, "index"), 0),
    "index zeroed": lambda f: _zero(_file(f, 6, "index")),
    "index bit flipped": lambda f: _flip(_file(f, 6, "index"), 20),
    "index missing": lambda f: _file(f, 6, "index").unlink(),
}


def _truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _zero(path):
    path.write_bytes(bytes(len(path.read_bytes())))


@pytest.fixture(params=sorted(_DAMAGES))
def damaged(folder, request):
    """The folder with its newest checkpoint damaged."""
    _DAMAGES[request.param](folder)
    return folder


def test_damage_is_found_and_the_file_named(damaged):
    with pytest.raises(DamagedCheckpoint) as error:
        committing_saver.verify(str(damaged / "model.ckpt-6"))
    assert str(error.value).startswith(f"{damaged / 'model.ckpt-6'}: ")


def test_the_checkpoint_before_a_damaged_one_is_taken(damaged, capsys):
    assert committing_saver.recover(str(damaged)).path == str(damaged / "model.ckpt-3")
    errors = capsys.readouterr().err
    assert f"passed over: {damaged / 'model.ckpt-6'}: " in errors
    assert "later saves may remove its files" in errors
    assert _steps(damaged) == [0, 3]
    # TensorFlow, which restores what this names, agrees.
    newest = tf.train.latest_checkpoint(str(damaged))
    assert newest == str(damaged / "model.ckpt-3")


@pytest.mark.parametrize("kind", ["index", "data-00000-of-00001"])
def test_every_flipped_bit_is_found_or_changes_nothing(folder, kind):
    """The index has bytes that nobody reads, such as the padding of its footer."""
    path = _file(folder, 6, kind)
    checkpoint = str(folder / "model.ckpt-6")
    content = path.read_bytes()
    places = range(0, len(content), max(1, len(content) // 150))
    found = 0
    for place in places:
        _flip(path, place)
        try:
            committing_saver.verify(checkpoint)
        except DamagedCheckpoint:
            found += 1
        else:
            weights = tf.train.NewCheckpointReader(checkpoint).get_tensor("weights")
            assert np.all(weights == 6)
        path.write_bytes(content)
    assert found > len(places) / 2
    assert found == len(places) or kind == "index"


def test_a_value_that_is_not_finite_is_named(tmp_path):
    """In a checkpoint of another program: an int, a float and a complex number."""
    tf.get_variable("a", initializer=np.array([1, 2]))
    tf.get_variable("b", initializer=np.array([1.0, 2.0]))
    tf.get_variable("c", initializer=np.array([1j, np.nan]))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(session, str(tmp_path / "other"))
    with pytest.raises(DamagedCheckpoint, match="other: tensor c is not finite"):
        committing_saver.verify(path)


def test_the_files_of_another_step_are_found_and_the_steps_named(folder):
    for kind in _NAMES:
        shutil.copy(str(_file(folder, 3, kind)), str(_file(folder, 6, kind)))
    with pytest.raises(DamagedCheckpoint, match="ckpt-6: tensor global_step is 3"):
        committing_saver.verify(str(folder / "model.ckpt-6"))
    assert committing_saver.recover(str(folder)).step == 3


@pytest.mark.parametrize("kind", ["index", "data-00000-of-00001"])
def test_a_named_pipe_is_never_waited_for(folder, kind):
    path = _file(folder, 6, kind)
    path.unlink()
    os.mkfifo(str(path))
    with pytest.raises(DamagedCheckpoint, match=f"ckpt-6: {path} is no regular file"):
        committing_saver.verify(str(folder / "model.ckpt-6"))


# Recovery


def test_a_folder_without_a_run_has_nothing_to_go_on_from(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert committing_saver.recover(str(tmp_path)) is None
    assert os.listdir(str(tmp_path)) == ["notes.txt"]


_STATES = {
    "missing": None,
    "empty": b"",
    "zeros": bytes(100),
    "text": b"step 6\n",
    "bytes": b"\xff\xfe\x80model_checkpoint_path",
    "half": b'model_checkpoint_path: "model.ck',
    "another field": b'run_name: "model.ckpt-6"',
    "huge": b'model_checkpoint_path: "' + b"x" * 2**21 + b'"',
    "NUL in the name": b'model_checkpoint_path: "model\\000.ckpt"',
}


@pytest.fixture(params=sorted(_STATES))
def without_state(folder, request):
    """The folder with a file `checkpoint` that says nothing."""
    (folder / "checkpoint").unlink()
    if _STATES[request.param] is not None:
        (folder / "checkpoint").write_bytes(_STATES[request.param])
    return folder


def test_the_state_file_is_rebuilt_from_what_is_there(without_state):
    assert _steps(without_state) == [0, 3, 6]
    assert committing_saver.recover(str(without_state)).step == 6
    state = tf.train.get_checkpoint_state(str(without_state))
    assert state.model_checkpoint_path == str(without_state / "model.ckpt-6")
    assert len(state.all_model_checkpoint_paths) == 3


def test_a_folder_in_place_of_the_state_file_is_an_error(folder):
    (folder / "checkpoint").unlink()
    (folder / "checkpoint").mkdir()
    assert _steps(folder) == [0, 3, 6]
    with pytest.raises(OSError, match="checkpoint"):
        committing_saver.recover(str(folder))


def test_a_complete_checkpoint_that_the_state_does_not_name_is_taken(folder):
    """Killed between the index and the state file."""
    state = (folder / "checkpoint").read_text()
    lines = [line for line in state.splitlines() if "ckpt-6" not in line]
    text = "\n".join(['model_checkpoint_path: "model.ckpt-3"', *lines]) + "\n"
    (folder / "checkpoint").write_text(text)
    assert _steps(folder) == [0, 3]
    assert committing_saver.recover(str(folder)).step == 6
    assert _steps(folder) == [0, 3, 6]


def test_a_state_file_with_absolute_paths_is_understood(folder):
    path = str(folder / "model.ckpt-6")
    tf.train.update_checkpoint_state(str(folder), path, [path])
    assert committing_saver.recover(str(folder)) == SavedCheckpoint(6, path)


def test_a_symbolic_link_and_the_folder_itself_are_the_same(folder, tmp_path):
    path = str(folder / "model.ckpt-6")
    tf.train.update_checkpoint_state(str(folder), path, [path])
    (tmp_path / "far" / "away").mkdir(parents=True)
    link = tmp_path / "far" / "away" / "link"
    link.symlink_to(folder)
    assert committing_saver.recover(str(link)) == SavedCheckpoint(
        6, str(link / "model.ckpt-6")
    )
    assert _steps(link) == [0, 3, 6]


def test_behind_a_link_the_checkpoint_of_another_folder_is_found(folder, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / "far" / "away" / "link"
    link.symlink_to(target)
    path = str(folder / "model.ckpt-6")
    tf.train.update_checkpoint_state(str(link), path, [path])
    assert committing_saver.recover(str(link)) == SavedCheckpoint(6, path)
    assert tf.train.latest_checkpoint(str(link)) == path


def test_a_checkpoint_of_another_name_is_taken_if_the_state_names_it(folder):
    for kind in _NAMES:
        for step in (0, 3):
            _file(folder, step, kind).unlink()
        _file(folder, 6, kind).rename(folder / f"pretrained.{kind}")
    (folder / "checkpoint").write_text('model_checkpoint_path: "pretrained"\n')
    before = _tree(folder)
    assert committing_saver.recover(str(folder)).path == str(folder / "pretrained")
    assert set(_tree(folder)) == set(before)


@pytest.mark.parametrize("state", ["named", "missing", "empty"])
@pytest.mark.parametrize("kind", ["index", "data-00000-of-00001", None])
def test_with_nothing_left_it_is_an_error_and_nothing_is_removed(folder, state, kind):
    """Every index, all data, or all files of all checkpoints are gone.

    Without any of them, and without a state file, `saved_steps.txt` tells of them.
    """
    for path in folder.glob(f"model.ckpt-*.{kind or '*'}"):
        path.unlink()
    if state != "named":
        (folder / "checkpoint").unlink()
    if state == "empty":
        (folder / "checkpoint").write_bytes(b"")
    before = _tree(folder)
    with pytest.raises(SavingError, match=f"{folder}.*no checkpoint in it can be"):
        committing_saver.recover(str(folder))
    assert _tree(folder) == before


def test_a_folder_from_which_all_was_removed_is_that_of_a_new_run(folder):
    for path in folder.iterdir():
        path.unlink()
    assert committing_saver.recover(str(folder)) is None


def test_a_run_killed_before_its_second_checkpoint_may_lose_its_first(tmp_path):
    """Step 0 is where it would begin anyway."""
    Run(tmp_path).save(0)
    for path in tmp_path.glob("model.ckpt-*"):
        path.unlink()
    (tmp_path / "checkpoint").unlink()
    assert committing_saver.recover(str(tmp_path)) is None


def test_leftovers_are_swept_and_nothing_else(folder):
    hexadecimal = "0123456789abcdef" * 2
    ours = [
        "model.ckpt-9.partial/",
        "checkpoint.partial",
        "config.json.partial",
        "saved_steps.txt.partial",
        "model.ckpt-9_temp/",
        f"model.ckpt-9_temp_{hexadecimal}/",
        "model.ckpt-9.index.tempstate1234567",
        f"checkpoint.tmp{hexadecimal}",
        f"graph.pbtxt.tmp{hexadecimal}",
        f"model.ckpt-9.meta.tmp{hexadecimal}",
        "model.ckpt-9.data-00000-of-00001",
        "model.ckpt-1.meta",
    ]
    others = [
        "my_temp/",
        "notes.partial",
        "model.ckpt-best.index",
        "model.ckpt-9.npz",
        "other.ckpt-9.data-00000-of-00001",
        "model.ckpt-9_temp_mine/",
        "graph.pbtxt.tmp",
        "weights.tempstate1",
    ]
    for name in ours + others:
        path = folder / name.rstrip("/")
        if name.endswith("/"):
            path.mkdir()
            path = path / "part-00000-of-00001.index"
        path.write_bytes(b"x")
    (folder / "model.ckpt-7_temp").symlink_to(folder / "my_temp")
    before = set(os.listdir(str(folder)))
    assert committing_saver.recover(str(folder)).step == 6
    swept = {name.rstrip("/") for name in ours} | {"model.ckpt-7_temp"}
    assert set(os.listdir(str(folder))) == before - swept
    assert os.listdir(str(folder / "my_temp"))


def test_orphans_are_collected_when_newer_checkpoints_come(folder):
    """One that nobody names (TensorFlow 1.15 leaves it for ever), and a damaged one."""
    for kind in _NAMES:
        shutil.copy(str(_file(folder, 3, kind)), str(_file(folder, 1, kind)))
    _truncate(_file(folder, 6, "index"), 0.5)
    newest = committing_saver.recover(str(folder))
    assert newest.step == 3
    Run(folder, keep=2).save(5, 7, 9)
    assert {path.name for path in folder.glob("*.index")} == {
        "model.ckpt-7.index",
        "model.ckpt-9.index",
    }


# What was ever saved


def test_every_step_is_noted_also_when_its_checkpoint_is_gone(tmp_path):
    run = Run(tmp_path, keep=1)
    run.save(0, 3, 7, 12)
    assert _steps(tmp_path) == [12]
    assert (tmp_path / "saved_steps.txt").read_text() == "0\n3\n7\n12\n"


def test_no_step_is_named_before_it_is_noted(tmp_path, monkeypatch):
    """At any moment of a commit, killed or without power."""
    (tmp_path / "run").mkdir()
    disk = _moments_of_a_commit(tmp_path / "run", monkeypatch)
    for tree in disk.killed + disk.powerless:
        named = set(re.findall(rb"ckpt-(\d+)", tree["checkpoint"]))
        assert named <= set(tree["saved_steps.txt"].split())


def test_recovery_notes_what_a_kill_or_another_program_did_not(folder):
    """The newest is damaged: it was saved, but is gone after that."""
    _truncate(_file(folder, 6, "index"), 0.5)
    (folder / "saved_steps.txt").unlink()
    assert committing_saver.recover(str(folder)).step == 3
    assert saved_steps.read(str(folder)) == {0, 3, 6}


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", set()),
        (b"0\n30\n6", {0, 6, 30}),
        (b"\n-1\n 2\n3.0\n\xb2\n4\n" + b"9" * 5000, {4}),
        (bytes(100), set()),
    ],
)
def test_a_line_that_is_no_step_is_passed_over(tmp_path, content, steps):
    (tmp_path / "saved_steps.txt").write_bytes(content)
    assert saved_steps.read(str(tmp_path)) == steps


def test_an_endless_file_of_steps_is_none(tmp_path):
    (tmp_path / "saved_steps.txt").symlink_to("/dev/zero")
    assert saved_steps.read(str(tmp_path)) == set()
    saved_steps.record(str(tmp_path), [3])
    assert not (tmp_path / "saved_steps.txt").is_symlink()
    assert saved_steps.read(str(tmp_path)) == {3}


# Killed between two steps, and without power


class Disk:
    """What lies in a folder at every moment of a commit, and what of it is durable.

    A SIGKILL leaves what is there. After a loss of power, a file whose content was not
    synced since it was written holds zeros.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        self.killed = []
        self.powerless = []
        self._synced = {}  # content by inode
        self._durable_names = set()
        for path in pathlib.Path(self.folder).iterdir():
            self._synced[path.stat().st_ino] = path.read_bytes()
        self._sync_folder()

    def observe(self):
        tree = _tree(self.folder)
        if not self.killed or tree != self.killed[-1]:
            self.killed.append(tree)
        self.powerless.append({name: self._after_loss(name, tree) for name in tree})
        # The worst order: of all renames since the last sync, only that of the state.
        names = self._durable_names | {"checkpoint"}
        self.powerless.append(
            {name: self._after_loss(name, tree) for name in tree if name in names}
        )

    def synced(self, descriptor):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self._sync_folder()
        else:
            self._synced[path.stat().st_ino] = path.read_bytes()

    def _sync_folder(self):
        self._durable_names = set(os.listdir(self.folder))

    def _after_loss(self, name, tree):
        if tree[name] is None:
            return None
        inode = os.stat(os.path.join(self.folder, name)).st_ino
        is_durable = self._synced.get(inode) == tree[name]
        return tree[name] if is_durable else bytes(len(tree[name]))


@contextlib.contextmanager
def _observed(disk, monkeypatch):
    """Looks at the disk before and after every change that is made to it."""

    def wrap(owner, name, then=None):
        function = getattr(owner, name)

        def observed(*args, **kwargs):
            disk.observe()
            result = function(*args, **kwargs)
            if then:
                then(*args)
            disk.observe()
            return result

        patch.setattr(owner, name, observed)

    with monkeypatch.context() as patch:
        for name in ("mkdir", "replace", "remove"):
            wrap(os, name)
        wrap(os, "fsync", disk.synced)
        wrap(tf.train.Saver, "save")
        wrap(shutil, "rmtree")
        yield


def _moments_of_a_commit(folder, monkeypatch):
    """The disk while step 6 is saved behind 0 and 3, of which 3 is kept."""
    run = Run(folder, keep=2)
    run.save(0, 3)
    disk = Disk(folder)
    with _observed(disk, monkeypatch):
        run.save(6)
    return disk


def _restored_step(folder, tree):
    """Writes the tree, recovers, and returns the step that the tensors tell."""
    shutil.rmtree(str(folder), ignore_errors=True)
    for name, content in sorted(tree.items()):
        path = folder / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    newest = committing_saver.recover(str(folder))
    weights = tf.train.NewCheckpointReader(newest.path).get_tensor("weights")
    assert np.all(weights == newest.step)
    return newest.step


def test_a_kill_between_any_two_steps_of_a_commit_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    trees = _moments_of_a_commit(tmp_path / "run", monkeypatch).killed
    steps = []
    for tree in trees:
        steps.append(_restored_step(tmp_path / "killed", tree))
        named = b"ckpt-6" in tree["checkpoint"]
        assert steps[-1] == 6 or not named
        allowed = {f"model.ckpt-{step}.{kind}" for step in (0, 3, 6) for kind in _NAMES}
        assert set(os.listdir(str(tmp_path / "killed"))) <= allowed | _OTHERS
        assert steps[-1] in saved_steps.read(str(tmp_path / "killed"))
    assert steps == sorted(steps)
    assert set(steps) == {3, 6}
    # folder, save, three renames, folder gone, state half-way, state, three removals
    assert len(trees) >= 11


def test_a_loss_of_power_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    trees = _moments_of_a_commit(tmp_path / "run", monkeypatch).powerless
    for tree in trees:
        step = _restored_step(tmp_path / "powerless", tree)
        # Whatever the state file names on the disk is complete there.
        assert step == 6 or b"ckpt-6" not in tree["checkpoint"]
        assert tree["checkpoint"].strip(b"\0")


# Any bytes


_bytes_settings = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@_bytes_settings
@given(st.binary(max_size=200))
def test_any_state_file_is_understood_or_rebuilt(saved, content):
    with _state_file(saved, content) as copy:
        for checkpoint in committing_saver.listed(copy):
            assert isinstance(checkpoint.step, int)
            with contextlib.suppress(DamagedCheckpoint):
                committing_saver.verify(checkpoint.path)


_state_lines = st.lists(
    st.tuples(
        st.sampled_from(["model_checkpoint_path", "all_model_checkpoint_paths"]),
        st.sampled_from(["", "model.ckpt-3", "model.ckpt-9", "/", "..", "\\000", "-9"]),
    ),
    max_size=5,
)


@_bytes_settings
@given(_state_lines)
def test_any_names_in_the_state_file_lead_to_the_newest(saved, lines):
    text = "".join(f'{field}: "{name}"\n' for field, name in lines)
    with _state_file(saved, text.encode()) as copy:
        assert committing_saver.recover(copy).step == 6


@contextlib.contextmanager
def _state_file(saved, content):
    """A copy of the folder, of which the state file has this content."""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "run")
        shutil.copytree(saved, copy)
        pathlib.Path(copy, "checkpoint").write_bytes(content)
        yield copy
