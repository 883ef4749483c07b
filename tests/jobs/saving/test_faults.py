"""Training and evaluation under real faults, in this process: nothing is lost.

What a commit does step by step is in test_checkpoints.py; what needs a process of its
own, such as a SIGKILL, is in test_faults_processes.py.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import evaluation, models, training
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from bn_tf1.jobs.evaluation import (
    EvaluationError,
    EvaluationTimeout,
    Request,
    TrainingStalled,
    evaluate,
)
from bn_tf1.jobs.saving import committing_saver, run_lock, saved_steps
from bn_tf1.jobs.saving.committing_saver import SavingError
from bn_tf1.jobs.saving.run_lock import LockedError
from bn_tf1.jobs.training import TrainingError, train

_DIGITS = datasets._embedded_digits()


class Killed(BaseException):
    """Ends a run in this process as abruptly as can be."""


def _config(model_dir, **options):
    return Config(
        model_dir=str(model_dir),
        **{
            "model": "mlp",
            "batch_size": 16,
            "max_steps": 8,
            "save_checkpoint_steps": 3,
            "log_steps": 1000,
            **options,
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps that nothing interrupted, for reading only."""
    folder = tmp_path_factory.mktemp("finished")
    train(_config(folder))
    return folder


def _saved_values(model_dir, step):
    path = os.path.join(str(model_dir), f"model.ckpt-{step}")
    reader = tf.train.NewCheckpointReader(path)
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in names}


def _assert_same_values(model_dir, expected_dir, step):
    expected = _saved_values(expected_dir, step)
    values = _saved_values(model_dir, step)
    assert set(values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)


def _steps(model_dir):
    return [checkpoint.step for checkpoint in committing_saver.listed(str(model_dir))]


@contextlib.contextmanager
def _at_save_of(step, act, monkeypatch):
    """Calls act() when the checkpoint of a step is about to be written."""
    save = tf.train.Saver.save

    def acting_save(saver, session, path, global_step, **options):
        if global_step == step:
            act()
        return save(saver, session, path, global_step=global_step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tf.train.Saver, "save", acting_save)
        yield


@contextlib.contextmanager
def _after_save_of(step, act, monkeypatch):
    """Calls act() when the checkpoint of a step is complete."""
    save = committing_saver.CommittingSaver.save

    def save_and_act(saver, session, path, global_step, **options):
        result = save(saver, session, path, global_step=global_step, **options)
        if global_step == step:
            act()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(committing_saver.CommittingSaver, "save", save_and_act)
        yield


# Interrupted and resumed


@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet"])
def test_a_run_killed_in_its_saves_ends_with_the_same_bits(
    tmp_path, model, monkeypatch
):
    """Default session options; weights, statistics, slots; with augmentation."""
    options = {"model": model, "resnet_n": 1}
    whole = _config(tmp_path / "whole", **options)
    train(whole)

    def kill():
        raise Killed

    killed = _config(tmp_path / "killed", **options)
    for step in (0, 3, 6, 8):
        with _at_save_of(step, kill, monkeypatch), pytest.raises(Killed):
            train(killed)
    assert train(killed).step == 8
    _assert_same_values(killed.model_dir, whole.model_dir, 8)
    left = {name for name in os.listdir(killed.model_dir) if "tfevents" not in name}
    assert left == {n for n in os.listdir(whole.model_dir) if "tfevents" not in n}


def test_a_damaged_newest_checkpoint_costs_its_steps_only(finished, tmp_path, capsys):
    folder = _copy(finished, tmp_path)
    data = folder / "model.ckpt-8.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    assert train(_config(folder)).step == 8
    captured = capsys.readouterr()
    assert f"passed over: {folder}/model.ckpt-8: " in captured.err
    assert f"resuming {folder} at step 6" in captured.out
    _assert_same_values(folder, finished, 8)


def test_without_a_state_file_a_run_goes_on(finished, tmp_path, capsys):
    folder = _copy(finished, tmp_path)
    (folder / "checkpoint").unlink()
    train(_config(folder))
    assert f"resuming {folder} at step 8" in capsys.readouterr().out


def test_with_no_usable_checkpoint_a_run_never_begins_anew(finished, tmp_path):
    folder = _copy(finished, tmp_path)
    for path in folder.glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(SavingError, match="no checkpoint in it can be used"):
        train(_config(folder))
    assert len(list(folder.glob("*.index"))) == 4


def _copy(source, tmp_path):
    shutil.copytree(str(source), str(tmp_path / "copy"))
    return tmp_path / "copy"


def test_a_foreign_meta_file_is_never_read(finished, tmp_path):
    """Neither by the training nor by the evaluation."""
    folder = _copy(finished, tmp_path)
    for path in folder.glob("*.meta"):
        path.write_bytes(b"\x80\x04cos\nsystem\n")
    assert train(_config(folder, max_steps=9)).step == 9
    assert next(evaluate(_request(folder, run_once=True))).step == 9


@pytest.mark.parametrize("options", [{"model": "convnet"}, {"dataset": "synthetic"}])
def test_another_network_than_the_saved_one_is_refused(finished, tmp_path, options):
    """Without its config.json a run could be started again with other flags."""
    folder = _copy(finished, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(SavingError, match=f"the network has .*{folder}/model.ckpt-8"):
        train(_config(folder, **options))
    assert _steps(folder) == [0, 3, 6, 8]


# The disk


@contextlib.contextmanager
def _file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_in_a_save_is_an_error_and_costs_nothing(
    finished, tmp_path, monkeypatch
):
    """TensorFlow reports it as the end of the data."""
    config = _config(tmp_path / "run")
    limit = contextlib.ExitStack()

    def set_limit():
        limit.enter_context(_file_size_limit(20000))

    with limit, _at_save_of(6, set_limit, monkeypatch), pytest.raises(
        TrainingError, match="ended at step 6 of 8: .*checkpoint of"
    ):
        train(config)
    assert _steps(config.model_dir) == [0, 3]
    assert train(config).step == 8
    _assert_same_values(config.model_dir, finished, 8)


def test_a_file_size_limit_at_the_start_is_an_error(tmp_path):
    reason = r"ended at step 0 of 8: .*checkpoint of step 0 .*File too large"
    with _file_size_limit(20000), pytest.raises(TrainingError, match=reason):
        train(_config(tmp_path))
    assert train(_config(tmp_path)).step == 8


def test_a_file_size_limit_below_the_graph_is_an_error(finished, tmp_path):
    """The graph is the largest file of a small network, and written after a step."""
    limit = os.path.getsize(str(finished / "graph.pbtxt")) - 1
    reason = r"ended at step 1 of 8: .*graph\.pbtxt.*File too large"
    with _file_size_limit(limit), pytest.raises(TrainingError, match=reason):
        train(_config(tmp_path / "run"))
    assert train(_config(tmp_path / "run")).step == 8
    _assert_same_values(str(tmp_path / "run"), finished, 8)


@contextlib.contextmanager
def _mounted(folder, *arguments):
    """mount(8) with these arguments at a folder, until the block ends."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *arguments, str(folder)]
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        # The event file of a run that failed may still be open.
        subprocess.check_call(["umount", "-l", str(folder)])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        yield disk


def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(
    small_disk, finished, monkeypatch
):
    disk = small_disk
    config = _config(disk / "run", keep_checkpoint_max=1)

    def fill():
        with contextlib.suppress(OSError), open(disk / "ballast", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    error = pytest.raises(TrainingError, match="ended at step 6 of 8")
    with _at_save_of(6, fill, monkeypatch), error:
        train(config)
    assert _steps(config.model_dir) == [3]
    # A restart on the full disk fails, too, and again costs nothing.
    with pytest.raises((OSError, TrainingError)):
        train(config)
    assert _steps(config.model_dir) == [3]
    (disk / "ballast").unlink()
    assert train(config).step == 8
    _assert_same_values(config.model_dir, finished, 8)


def test_a_disk_that_became_read_only_is_an_error(unfinished, tmp_path):
    with _mounted(tmp_path / "view", "--bind", str(unfinished)) as view:
        command = ["mount", "-o", "remount,bind,ro", str(view)]
        subprocess.check_call(command)
        with pytest.raises(OSError, match="Read-only file system: .*view"):
            train(_config(view, max_steps=20))
        # An evaluation may write elsewhere.
        request = _request(view, run_once=True, eval_dir=str(tmp_path / "eval"))
        assert next(evaluate(request)).step == 8


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match="run"):
        train(_config(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_vanishes_is_an_error(tmp_path, monkeypatch):
    config = _config(tmp_path / "run")
    error = pytest.raises(TrainingError, match="ended at step 6 of 8: .*cannot be")
    with _at_save_of(6, lambda: shutil.rmtree(config.model_dir), monkeypatch), error:
        train(config)
    assert not os.path.exists(config.model_dir)


def test_another_folder_in_the_place_of_the_runs_is_an_error(
    tmp_path, finished, monkeypatch
):
    """Its lock is free: a second training may be in it."""
    config = _config(tmp_path / "run")

    def replace():
        os.rename(config.model_dir, str(tmp_path / "moved"))
        os.mkdir(config.model_dir)

    # It is noticed at the save after that, or at the end of the run.
    error = pytest.raises(TrainingError, match="at step 6 of 8: .*another folder has")
    with _after_save_of(3, replace, monkeypatch), error:
        train(config)
    assert [n for n in os.listdir(config.model_dir) if "tfevents" not in n] == []
    assert train(_config(tmp_path / "moved")).step == 8
    _assert_same_values(tmp_path / "moved", finished, 8)


# NaN


def test_statistics_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """The loss of the step in which they become NaN is still finite."""
    config = _config(tmp_path, save_checkpoint_steps=1)
    mlp = models.MODELS["mlp"]

    def spoilt(images, is_training, settings):
        logits = mlp(images, is_training, settings)
        step = tf.train.get_global_step()
        late = tf.where(tf.equal(step, 4), np.float32(np.nan), np.float32(0))
        mean = next(
            v for v in tf.global_variables() if v.op.name.endswith("moving_mean")
        )
        spoil = mean.assign_add(tf.fill(mean.shape, late))
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, spoil)
        return logits

    monkeypatch.setitem(models.MODELS, "mlp", spoilt)
    with pytest.raises(
        TrainingError,
        match="ended at step 5 of 8: .* of step 5 .*: tensor .*moving_mean is not finite",
    ):
        train(config)
    assert _steps(tmp_path)[-1] == 4
    assert committing_saver.recover(str(tmp_path)).step == 4


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(
    tmp_path, loss, monkeypatch
):
    build = training._build_step

    def spoilt(*arguments):
        step = build(*arguments)
        is_late = tf.greater_equal(step.global_step, 4)
        late = tf.where(is_late, np.float32(loss), np.float32(0))
        return step._replace(total_loss=step.total_loss + late)

    monkeypatch.setattr(training, "_build_step", spoilt)
    words = (
        rf"the loss is not finite at step [45]: tensor add\w*:0 is {loss}, and after "
        "the step all variables are finite; try"
    )
    with pytest.raises(TrainingError, match=words):
        train(_config(tmp_path))
    assert _steps(tmp_path) == [0, 3]


def test_a_loss_that_is_not_finite_is_named_with_the_first_such_variable(
    tmp_path, monkeypatch
):
    mlp = models.MODELS["mlp"]

    def spoilt(images, is_training, settings):
        late = tf.greater_equal(tf.train.get_global_step(), 4)
        factor = tf.where(late, np.float32(np.nan), np.float32(1))
        return mlp(images, is_training, settings) * factor

    monkeypatch.setitem(models.MODELS, "mlp", spoilt)
    words = (
        r"at step 5: tensor total_loss:0 is nan, and after the step \d+ of \d+ "
        "variables are not, layer1/weights the first; "
    )
    with pytest.raises(TrainingError, match=words):
        train(_config(tmp_path))
    assert _steps(tmp_path) == [0, 3]


# One trainer in one folder


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE_SECS", 0.1)


def test_a_second_trainer_is_refused_and_the_first_one_named(tmp_path):
    config = _config(tmp_path)
    with run_lock.hold(config.model_dir):
        with pytest.raises(LockedError, match=rf"in which process {os.getpid()} on "):
            train(config)
        assert run_lock.is_held(config.model_dir)
    assert not run_lock.is_held(config.model_dir)
    assert train(config).step == 8


def test_the_files_of_a_lock_whose_process_is_dead_block_nobody(tmp_path):
    (tmp_path / "train.lock").write_text("4194304")
    (tmp_path / "train.holder").write_text('{"pid": 4194304, "host": "gone"}')
    assert train(_config(tmp_path)).step == 8
    assert not (tmp_path / "train.holder").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}'])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, content):
    with run_lock.hold(str(tmp_path)):
        (tmp_path / "train.holder").write_bytes(content)
        with pytest.raises(LockedError, match="in which another process is training"):
            train(_config(tmp_path))


def test_the_lock_is_released_when_a_run_fails(tmp_path, monkeypatch):
    def kill():
        raise Killed

    with _at_save_of(3, kill, monkeypatch), pytest.raises(Killed):
        train(_config(tmp_path))
    assert not run_lock.is_held(str(tmp_path))


# The data


@pytest.fixture
def data_dir(tmp_path):
    shutil.copytree(_DIGITS, str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_data_that_changed_are_noticed_at_resume(data_dir, tmp_path, split):
    config = _config(tmp_path / "run", data_dir=str(data_dir), max_steps=3)
    train(config)
    checksum = configuration.load(config.model_dir).data_checksum
    assert len(checksum) == 64
    path = data_dir / f"{split}-labels-idx1-ubyte.gz"
    _change_last_label(path)
    with pytest.raises(DataFileError, match=f"{data_dir}.*{checksum}.*config.json"):
        train(dataclasses.replace(config, max_steps=8))
    assert _steps(config.model_dir) == [0, 3]


def _change_last_label(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    path.write_bytes(gzip.compress(bytes(content)))


def test_the_same_data_in_another_place_and_uncompressed_are_the_same(
    data_dir, tmp_path
):
    config = _config(tmp_path / "run", max_steps=3)
    train(config)
    for path in data_dir.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    moved = dataclasses.replace(config, data_dir=str(data_dir), max_steps=4)
    assert train(moved).step == 4


def test_a_checksum_that_is_given_must_be_that_of_the_data(tmp_path):
    with pytest.raises(DataFileError, match="--data_checksum"):
        train(_config(tmp_path, data_checksum="0" * 64))
    assert not list(tmp_path.glob("model.ckpt*"))


def test_a_run_from_before_there_were_checksums_goes_on(finished, tmp_path):
    folder = _copy(finished, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["data_checksum"], values["grace_secs"]
    (folder / "config.json").write_text(json.dumps(values))
    train(_config(folder, max_steps=9))
    assert configuration.load(str(folder)).data_checksum


# The evaluation beside it


def _request(model_dir, **options):
    return Request(str(model_dir), **options)


def _follow(folder, **options):
    return evaluate(_request(folder, timeout_secs=0.0, **options))


@pytest.fixture
def unfinished(finished, tmp_path):
    """The run of 8 steps as if it were to have 20, with checkpoints 0, 3, 6 and 8."""
    folder = _copy(finished, tmp_path)
    config = dataclasses.replace(configuration.load(str(folder)), max_steps=20)
    configuration.save(config)
    return folder


def _name_in_state(folder, *steps):
    paths = [f"model.ckpt-{step}" for step in steps]
    tf.train.update_checkpoint_state(str(folder), paths[-1], paths)


def test_following_measures_each_new_step_once_in_order(unfinished):
    _name_in_state(unfinished, 0)
    steps = []
    with pytest.raises(EvaluationTimeout):
        for result in _follow(unfinished):
            steps.append(result.step)
            _name_in_state(unfinished, 0, 3, 6, 8)
    assert steps == [0, 3, 6, 8]


def test_following_reports_what_is_removed_before_it_is_measured(unfinished, capsys):
    """Step 3 while 0 is measured; 6 after it was seen.

    Step 7 is none of the interval: a stopped run saved it, and the next one removed it.
    """
    saved_steps.record(str(unfinished), [5, 7])
    _name_in_state(unfinished, 0)
    steps = []
    with pytest.raises(EvaluationTimeout):
        for result in _follow(unfinished):
            steps.append(result.step)
            _remove(unfinished, 3)
            _remove(unfinished, 6)
            _name_in_state(unfinished, 6, 8)
    errors = capsys.readouterr().err
    assert steps == [0, 8]
    assert "skipped steps 3, 5, 7: removed before " in errors
    assert errors.count("skipped") == 2
    assert "skipped step 6: " in errors
    assert f"there is no {unfinished}/model.ckpt-6.index" in errors


def _remove(folder, step):
    for path in folder.glob(f"model.ckpt-{step}.*"):
        path.unlink()


def test_following_from_the_start_counts_what_came_before_the_first_measurement(
    unfinished, monkeypatch, capsys
):
    """Nothing is there at the first look, and much at the second."""
    listed = committing_saver.listed
    looks = [[], []]
    monkeypatch.setattr(
        committing_saver,
        "listed",
        lambda folder: looks.pop() if looks else listed(folder),
    )
    _remove(unfinished, 0)
    _name_in_state(unfinished, 3, 6, 8)
    results = evaluate(_request(unfinished, timeout_secs=2.0))
    assert [next(results).step for _ in range(3)] == [3, 6, 8]
    errors = capsys.readouterr().err
    waiting, *skipped = errors.splitlines()
    assert waiting.startswith("waiting for 2 s for the first checkpoint in ")
    assert skipped == ["skipped step 0: removed before it could be measured"]


def test_nothing_is_reported_where_nothing_was_lost(finished, tmp_path, capsys):
    """Every checkpoint is there, but not at every look; saved at 3, 6 and the end."""
    folder = _copy(finished, tmp_path)
    _name_in_state(folder, 0)
    steps = []
    for result in _follow(folder):
        steps.append(result.step)
        _name_in_state(folder, *{0: [0, 3, 6], 3: [6], 6: [6, 8], 8: [8]}[steps[-1]])
    assert steps == [0, 3, 6, 8]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"0\n8\n"])
def test_without_a_note_of_the_saved_steps_a_gap_may_hide_one(
    unfinished, capsys, content
):
    """In the folder of an older version's run, or with the file damaged."""
    _name_in_state(unfinished, 3)
    results = _follow(unfinished)
    assert next(results).step == 3
    (unfinished / "saved_steps.txt").unlink()
    if content is not None:
        (unfinished / "saved_steps.txt").write_bytes(content)
    _name_in_state(unfinished, 8)
    assert next(results).step == 8
    assert "skipped steps 4 to 7: " in capsys.readouterr().err


def test_following_passes_over_a_damaged_checkpoint(unfinished, capsys):
    (unfinished / "model.ckpt-6.data-00000-of-00001").write_bytes(bytes(100))
    _name_in_state(unfinished, 3)
    steps = []
    with pytest.raises(EvaluationTimeout):
        for result in _follow(unfinished):
            steps.append(result.step)
            _name_in_state(unfinished, 3, 6, 8)
    assert steps == [3, 8]
    assert f"skipped step 6: {unfinished}/model.ckpt-6: " in capsys.readouterr().err


def test_a_checkpoint_removed_while_it_is_restored_is_skipped(
    unfinished, monkeypatch, capsys
):
    verify = committing_saver.verify

    def verify_then_lose(path):
        verify(path)
        if path.endswith("-6"):
            _remove(unfinished, 6)

    monkeypatch.setattr(committing_saver, "verify", verify_then_lose)
    _name_in_state(unfinished, 3)
    steps = []
    with pytest.raises(EvaluationTimeout):
        for result in _follow(unfinished):
            steps.append(result.step)
            _name_in_state(unfinished, 3, 6, 8)
    assert steps == [3, 8]
    assert "skipped step 6: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00"])
def test_following_needs_no_state_file(unfinished, content):
    (unfinished / "checkpoint").unlink()
    if content is not None:
        (unfinished / "checkpoint").write_bytes(content)
    assert next(_follow(unfinished)).step == 8


def test_a_follower_that_is_started_again_goes_on_behind_its_last_step(unfinished):
    _name_in_state(unfinished, 0, 3)
    assert next(_follow(unfinished)).step == 3
    results = unfinished / "eval" / "results.jsonl"
    results.write_text(results.read_text() + '{"step": 6, "check')  # killed
    _name_in_state(unfinished, 0, 3, 6, 8)
    steps = []
    with pytest.raises(EvaluationTimeout):
        for result in _follow(unfinished):
            steps.append(result.step)
    assert steps == [6, 8]
    assert evaluation._measured_steps(_request(unfinished)) == [3, 6, 8]


def test_a_follower_that_is_started_again_measures_no_step_again(unfinished):
    """Also where the newest was damaged since, and the one before is the newest."""
    assert next(_follow(unfinished)).step == 8
    for newest in (8, 6):
        _name_in_state(unfinished, newest)
        with pytest.raises(EvaluationTimeout):
            next(_follow(unfinished))
    assert evaluation._measured_steps(_request(unfinished)) == [8]


def test_following_a_run_that_is_measured_to_the_end_says_so(
    finished, tmp_path, capsys
):
    folder = _copy(finished, tmp_path)
    assert [result.step for result in evaluate(_request(folder))] == [8]
    capsys.readouterr()
    assert list(evaluate(_request(folder))) == []
    assert capsys.readouterr().out == (
        f"step 8, the last one, is measured already: see {folder}/eval/results.jsonl\n"
    )


def test_results_of_another_split_or_run_are_no_measurements(
    finished, unfinished, tmp_path
):
    """In one folder for all results."""
    eval_dir = str(tmp_path / "results")
    for model_dir, split in [
        (unfinished, "test"),
        (unfinished, "train"),
        (finished, "train"),
    ]:
        request = _request(model_dir, eval_dir=eval_dir, split=split, timeout_secs=0.0)
        assert next(evaluate(request)).step == 8


def test_results_of_a_run_that_was_there_before_are_no_measurements(unfinished):
    (unfinished / "eval").mkdir()
    line = {"step": 9, "split": "test", "checkpoint": f"{unfinished}/model.ckpt-9"}
    (unfinished / "eval" / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert next(_follow(unfinished)).step == 8


def test_a_step_measured_again_on_demand_is_written_down_once(unfinished):
    for _ in range(2):
        (result,) = evaluate(_request(unfinished, run_once=True))
        assert result.step == 8
    assert evaluation._measured_steps(_request(unfinished)) == [8]


def test_evaluating_once_takes_the_one_before_a_damaged_one(finished, tmp_path, capsys):
    folder = _copy(finished, tmp_path)
    data = folder / "model.ckpt-8.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-9])
    (result,) = evaluate(_request(folder, run_once=True))
    assert result.step == 6
    errors = capsys.readouterr().err
    assert "skipped step 8: " in errors and "the file is cut off" in errors
    assert "warning: step 6 was evaluated, an older one" in errors


def test_evaluating_once_without_a_usable_checkpoint_is_an_error(finished, tmp_path):
    folder = _copy(finished, tmp_path)
    for path in folder.glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(EvaluationError, match="no checkpoint that can be read in it"):
        list(evaluate(_request(folder, run_once=True)))


def test_a_timeout_tells_whether_somebody_trains(unfinished):
    stalled = pytest.raises(TrainingStalled, match="a process is still training")
    with run_lock.hold(str(unfinished)), stalled:
        list(_follow(unfinished))
    with pytest.raises(EvaluationTimeout, match="no process is training") as error:
        list(_follow(unfinished))
    assert not isinstance(error.value, TrainingStalled)
