"""train.py and eval.py as their users run them: what they print, write and return."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network_from_config
from bn_tf1.jobs.data import datasets
from tests import ROOT

# What the level of the tests' own set-up would show of TensorFlow's log.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
_NOTES = ("beginning with step ", "waiting for ")


def _command(script, *flags):
    return [sys.executable, str(ROOT / script)] + [str(flag) for flag in flags]


def _run(script, *flags, cwd=ROOT):
    return subprocess.run(
        _command(script, *flags),
        cwd=str(cwd),
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def _error_line(result):
    """The last line on standard error, where nothing but notes of our own is before it."""
    *notes, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(note.startswith(_NOTES) for note in notes), result.stderr
    return line


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """`python train.py` and `python eval.py --run_once`, without any other flag."""
    folder = tmp_path_factory.mktemp("default")
    trained = _run("train.py", cwd=folder)
    evaluated = _run("eval.py", "--run_once", cwd=folder)
    return folder, trained, evaluated


def test_train_without_a_flag_trains_on_the_digits(default_run):
    folder, trained, _ = default_run
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    *progress, done, curves, command = trained.stdout.splitlines()
    assert progress[0].startswith("step 100/1000: loss ")
    assert re.fullmatch(r"done: step 1000, loss \d\.\d{4}, \d+\.\d seconds", done)
    assert curves == "curves in runs/default/report.html; evaluate with:"
    assert "<figcaption>Loss</figcaption>" in (
        (folder / "runs" / "default" / "report.html").read_text(encoding="utf-8")
    )
    typed = subprocess.check_output(command, shell=True, cwd=str(folder), text=True)
    assert typed.startswith("step 1000: accuracy 0.9")
    saved = configuration.load(str(folder / "runs" / "default"))
    assert (saved.dataset, saved.model, saved.max_steps) == ("digits", "convnet", 1000)


def test_eval_reports_at_least_98_5_percent(default_run):
    folder, _, evaluated = default_run
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stderr == ""
    eval_dir = folder / "runs" / "default" / "eval"
    (line,) = (eval_dir / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["step"] == 1000
    assert result["examples"] == 360
    assert result["accuracy"] >= 0.985
    assert evaluated.stdout == (
        f"step 1000: accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f} "
        "on 360 test examples\n"
    )
    assert list(eval_dir.glob("events*"))


def test_moving_statistics_predict_as_well_as_those_of_the_batch(default_run):
    """Within half a point in batches of 180 test examples, on average over five seeds.

    Of one run it says little: each of the 360 examples is 0.28 points, and on which side
    of the border the last ones fall changes with the rounding of any operation.
    """
    folder, _, _ = default_run
    differences = []
    for seed in range(5):
        model_dir = folder / "runs" / "default"
        if seed > 0:
            model_dir = folder / f"seed_{seed}"
            flags = [f"--model_dir={model_dir}", f"--seed={seed}"]
            assert _run("train.py", *flags, cwd=folder).returncode == 0
        accuracy = {mode: _accuracy(str(model_dir), mode) for mode in (True, False)}
        differences.append(accuracy[True] - accuracy[False])
    assert abs(np.mean(differences)) <= 0.005, differences


def _accuracy(model_dir, is_training):
    """On the test examples, in batches of 180, with the statistics of `is_training`."""
    config = configuration.load(model_dir)
    dataset = network_from_config.open_split(config, "test")
    with tf.Graph().as_default(), tf.Session() as session:
        iterator = tf.data.make_initializable_iterator(
            datasets.evaluation_batches(dataset, 180)
        )
        objective = network_from_config.build(
            *iterator.get_next(), is_training, config, dataset.num_classes
        )
        path = tf.train.latest_checkpoint(model_dir)
        tf.train.Saver(tf.global_variables()).restore(session, path)
        session.run(iterator.initializer)
        return np.mean([session.run(objective.hits) for _ in range(2)])


def test_the_trained_statistics_have_forgotten_where_they_started(default_run):
    folder, _, _ = default_run
    config = configuration.load(str(folder / "runs" / "default"))
    assert config.bn_decay**config.max_steps < 1e-9


def test_training_again_with_another_flag_names_both_values(default_run):
    folder, _, _ = default_run
    result = _run("train.py", "--batch_size=32", cwd=folder)
    assert result.returncode == 2
    line = _error_line(result)
    assert "--batch_size is 32" in line
    assert "started with 64" in line


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train.py", ["--batch_sise=8"], "batch_sise"),
        ("train.py", ["--bn_decay=1.5"], "--bn_decay is 1.5, but must be less than"),
        (
            "train.py",
            ["--max_steps=many"],
            "--max_steps is 'many', but must be an integer",
        ),
        (
            "train.py",
            ["--bn_decay=cumulativ"],
            "--bn_decay is 'cumulativ', but must be a number or 'cumulative'",
        ),
        ("train.py", ["--augment", "False"], "write --augment=False, or --noaugment"),
        ("train.py", ["digits"], "unexpected argument 'digits'"),
        ("train.py", ["--dataset=mnist"], "--data_dir=FOLDER with train-images"),
        ("train.py", ["--data_checksum=no"], "--data_checksum is 'no', but must be a"),
        ("train.py", ["--worker_hosts=foo"], "--worker_hosts has 'foo', but must have"),
        (
            "train.py",
            ["--worker_hosts=a:1,b:1", "--task_index=5"],
            "--task_index is 5, but must lie in [0, 2), as --worker_hosts says",
        ),
        ("train.py", ["--noaugment=1"], "--noaugment=1 does not take an argument"),
        (
            "eval.py",
            ["--split=vali\ndation"],
            r"--split is 'vali\ndation', but must be one of test, train",
        ),
        ("eval.py", ["--model=mlp"], "--model is no flag here: it is read from"),
        ("eval.py", ["--run_once=3"], "--run_once is '3', but must be true or false"),
        (
            "eval.py",
            ["--timeout_secs=-1"],
            "--timeout_secs is '-1', but must be a number, at least 0",
        ),
        (
            "train.py",
            ["--task_index=1"],
            "--task_index is 1, but does nothing without several workers",
        ),
        (
            "eval.py",
            ["--exported=m.pb", "--run_once"],
            "--run_once is about the checkpoints of a run, but --exported measures m.pb",
        ),
        ("eval.py", ["--eval_dir="], "--eval_dir is '', but must be the name of a"),
        ("eval.py", ["--timeout_secs=nan"], "--timeout_secs is nan, but must be"),
        ("eval.py", ["--timeout_secs=1", "--run_once"], "with --run_once nothing"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(tmp_path, script, flags, words):
    result = _run(script, "--model_dir", tmp_path, *flags)
    assert result.returncode == 2
    assert words in _error_line(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "code", "words"),
    [("--help", 0, "examples:"), ("--seed=-1", 2, "--seed"), ("--x", 2, "flag 'x'")],
)
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_and_usage_do_not_wait_for_tensorflow(tmp_path, script, flag, code, words):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    result = subprocess.run(
        _command(script, flag),
        env={**_ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert words in result.stdout + result.stderr


def test_a_damaged_data_file_is_named_before_the_first_step(tmp_path):
    damaged = tmp_path / "data"
    damaged.mkdir()
    for path in (ROOT / "data" / "digits").glob("*.gz"):
        (damaged / path.name).write_bytes(path.read_bytes()[:100])
    model_dir = tmp_path / "run"
    result = _run("train.py", "--data_dir", damaged, "--model_dir", model_dir)
    assert result.returncode == 1
    assert "train-images-idx3-ubyte.gz: at byte" in _error_line(result)
    assert not model_dir.exists()


def test_a_loss_that_is_not_finite_ends_with_code_1(tmp_path):
    flags = ["--learning_rate=1e30", "--normalization=none", "--model=mlp"]
    result = _run("train.py", "--train_dir", tmp_path, *flags)
    assert result.returncode == 1
    assert "loss is not finite" in _error_line(result)


def test_eval_without_a_checkpoint_ends_with_code_1(tmp_path):
    result = _run("eval.py", "--model_dir", tmp_path, "--run_once")
    assert result.returncode == 1
    assert "no checkpoint in it" in _error_line(result)


@pytest.fixture
def unfinished_run(default_run, tmp_path):
    """A run whose last step is still to come, and of which no step is measured."""
    folder, _, _ = default_run
    subprocess.check_call(["cp", "-r", str(folder / "runs" / "default"), str(tmp_path)])
    shutil.rmtree(str(tmp_path / "default" / "eval"))
    path = tmp_path / "default" / "config.json"
    values = {**json.loads(path.read_text()), "max_steps": 2000}
    path.write_text(json.dumps(values))
    return tmp_path / "default"


def test_eval_that_times_out_ends_with_code_3(unfinished_run):
    result = _run("eval.py", "--model_dir", unfinished_run, "--timeout_secs=0")
    assert result.returncode == 3
    assert result.stdout.startswith("step 1000: accuracy")
    assert "no new checkpoint" in _error_line(result)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_an_eval_that_waits(unfinished_run, number, code):
    process = subprocess.Popen(
        _command("eval.py", "--model_dir", unfinished_run),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("step 1000: accuracy")
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in errors


def test_help_lists_each_flag_in_its_group_with_its_meaning():
    result = _run("train.py", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "tensorflow.python" not in result.stdout  # which has flags of its own
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(ROOT))
    places = [
        result.stdout.index(f"\n{group}:\n")
        for group in ("data", "model", "batch norm", "optimisation", "run", "examples")
    ]
    assert places == sorted(places)
    for field in configuration.Config.__dataclass_fields__.values():
        assert f"  --{field.name}=" in result.stdout or f"--[no]{field.name}\n" in (
            result.stdout
        )
        assert field.metadata["help"].split()[0] in result.stdout
    result = _run("eval.py", "--help")
    assert result.returncode == 0
    assert "--[no]weight_ema\n" in result.stdout
    assert "train_dir" not in result.stdout and "alsologtostderr" not in result.stdout


def test_a_finished_run_says_how_to_go_on(default_run):
    folder, _, _ = default_run
    result = _run("train.py", cwd=folder)
    assert result.returncode == 0
    assert "nothing to do" in result.stdout and "--max_steps=2000" in result.stdout


def test_fewer_steps_than_were_made_are_an_error(default_run):
    folder, _, _ = default_run
    path = folder / "runs" / "default" / "config.json"
    before = path.read_bytes()
    result = _run("train.py", "--max_steps=500", cwd=folder)
    assert result.returncode == 2
    assert "--max_steps is 500" in _error_line(result)
    assert "step 1000" in _error_line(result)
    assert path.read_bytes() == before


def test_importing_the_package_from_elsewhere_needs_no_checkout(tmp_path):
    code = "import bn_tf1; print(bn_tf1.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=str(tmp_path),
        env=environment,
        text=True,
    )
    assert output.strip() == bn_tf1.__version__
