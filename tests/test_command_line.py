"""The command line: what it prints, and its exit codes."""

import importlib
import os
import shlex
import subprocess
import sys

import pytest

import bn_tf1
from bn_tf1.__main__ import main
from tests import FIXTURES, ROOT

TF_LAYERS = str(FIXTURES / "tf_layers" / "model.ckpt")
SONNET = str(FIXTURES / "sonnet" / "model.ckpt")
RECALIBRATE = ["recalibrate", SONNET + ".meta", "new", "--checkpoint", SONNET]


def test_convert(tmp_path, capsys):
    target = str(tmp_path / "new")
    command = ["convert", SONNET, target, "--from", "sonnet", "--to", "tensorpack"]
    assert main(command + ["--dry_run"]) == 0
    planned = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
    table, _ = planned.split("nothing was written: this was a dry run\n")
    said = f"wrote {target}, read it back and compared it\n"
    assert capsys.readouterr().out == table + said
    assert "batch_norm/moving_mean" in planned
    assert os.path.exists(target + ".index")


def test_every_option_of_convert(tmp_path, capsys):
    command = ["convert", SONNET, str(tmp_path / "new"), "--from=sonnet", "--to=sonnet"]
    command += ["--map", "conv=conv_2", "batch_norm=bn", "--map", "batch_norm_1=bn_1"]
    command += ["--shape", "1,C", "--drop", "*/Momentum", "global_step"]
    assert main(command) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["conv/kernel", "conv_2/kernel"] in rows
    assert ["batch_norm/beta", "bn/beta"] in rows
    assert ["global_step", "-"] in rows
    command = ["convert", str(tmp_path / "new"), str(tmp_path / "back")]
    command += ["--from", "sonnet", "--to", "sonnet", "--like", SONNET + ".meta"]
    assert main(command) == 0
    assert ["bn_1/beta", "batch_norm_1/beta"] in [
        line.split()[:2] for line in capsys.readouterr().out.splitlines()
    ]


def test_migrate_graph(tmp_path, capsys):
    source = str(FIXTURES / "while_v1" / "model.ckpt.meta")
    assert main(["migrate_graph", source, str(tmp_path / "new.meta")]) == 0
    assert "removed _output_shapes of" in capsys.readouterr().out
    assert (tmp_path / "new.meta").exists()


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["convert", "nowhere", "new", "--from", "slim", "--to", "keras"],
            "convert: there is no checkpoint nowhere\n",
        ),
        (
            ["migrate_graph", "nowhere.meta", "new.meta"],
            "migrate_graph: nowhere.meta cannot be read: No such file or directory\n",
        ),
        (
            ["convert", SONNET, "/no/new", "--from=sonnet", "--to=keras", "--map"]
            + ["conv=a", "conv=b"],
            "convert: `--map` gives 'conv' two names\n",
        ),
        (
            ["convert", SONNET, "tests", "--from=sonnet", "--to=keras"],
            (
                "convert: tests exists as a directory, and nothing is written over: give a "
                "prefix, such as tests/model.ckpt\n"
            ),
        ),
        (
            ["convert", os.path.dirname(SONNET), "new", "--from=sonnet", "--to=keras"],
            (
                f"convert: directory {os.path.dirname(SONNET)} names no checkpoint in its "
                "file `checkpoint`: give the prefix of one; in "
                f"{os.path.dirname(SONNET)} there are: model.ckpt\n"
            ),
        ),
        (
            ["migrate_graph", "README.md", "new.meta"],
            (
                "migrate_graph: README.md is a text file, and no MetaGraphDef, as a .meta "
                "file is\n"
            ),
        ),
        (
            ["migrate_graph", SONNET + ".index", "new.meta"],
            (
                f"migrate_graph: {SONNET}.index is a part of a checkpoint: give its graph, "
                f"{SONNET}.meta\n"
            ),
        ),
        (
            ["migrate_graph", SONNET + ".meta", "nowhere/new.meta"],
            (
                "migrate_graph: nowhere/new.meta: there is no directory nowhere: make it, "
                "or give another\n"
            ),
        ),
        (
            ["convert", TF_LAYERS, "new", "--from=sonnet", "--to=slim"],
            (
                "convert: `from_dialect` (--from) is 'sonnet', but the variables of layers "
                "['batch_normalization', 'batch_normalization_1'] in "
                f"{TF_LAYERS} have shape [C], as no layer of it has: say which library "
                "wrote it\n"
            ),
        ),
        (
            ["recalibrate", SONNET, "new", "--examples=README.md"],
            (
                f"recalibrate: {SONNET} is the prefix of a checkpoint: give its graph as "
                f"SOURCE, {SONNET}.meta, with --checkpoint {SONNET} and --examples "
                "X.npz\n"
            ),
        ),
        (
            [*RECALIBRATE, "--examples=nowhere.npz"],
            (
                "recalibrate: --examples nowhere.npz cannot be read: No such file or "
                "directory\n"
            ),
        ),
        (
            [*RECALIBRATE, "--examples=README.md"],
            (
                "recalibrate: --examples README.md is no .npz file of numbers, as np.savez "
                "writes it, but a text file\n"
            ),
        ),
        (
            ["recalibrate", "tests", "new"],
            (
                "recalibrate: tests has no config.json, and so is no folder of a run of "
                "train.py: of other runs give the .meta file, with --checkpoint and "
                "--examples\n"
            ),
        ),
        (
            ["launch", "--workers=2", "train.py"],
            (
                "launch: train.py is no program that can be started by itself: give -- "
                "python train.py ...\n"
            ),
        ),
        (
            ["launch", "--", "no_such_program"],
            (
                "launch: there is no program no_such_program that can be started: give one "
                "of PATH or the path of one, such as -- python train.py ...\n"
            ),
        ),
        (
            ["launch", "--workers=0", "--", "true"],
            "launch: --workers is 0, but must be at least 1\n",
        ),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(command, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


@pytest.mark.parametrize(
    "command, message",
    [
        (["--verison"], "did you mean --version?"),
        (["doctor_who"], "invalid choice: 'doctor_who'"),
        (["convert", "a", "b", "--from", "slim"], "required: --to"),
        (["convert", "a", "b", "--from=x", "--to=slim"], "--from: invalid choice: 'x'"),
        (
            ["convert", "a", "b", "--from=slim", "--to=slim", "--map", "old"],
            "--map: 'old' is not of the form OLD=NEW",
        ),
        (
            ["convert", "a", "b", "--from=pytorch", "--to=slim"],
            "--from: convert reads checkpoints of TensorFlow: in PyTorch, rename",
        ),
        (["doctor", "--list", "a"], "--explain and --list examine no PATH"),
        (["migrate_graph", "a"], "required: destination"),
        (["export", "a", "b", "--time_limit=0"], "'0' is no number of seconds above 0"),
        (["convrt", "a", "b"], "did you mean convert?"),
        (["convert", "--from=x", "--to=y"], "invalid choice: 'x'"),
        (["convert", "a", "b", "--from=kears", "--to=slim"], "did you mean keras?"),
        (["migrate_graph", "a", "b", "c"], "migrate_graph: error: unrecognized"),
        (
            ["convert", "a", "b", "--from=slim", "--to=slim", "--dry-run"],
            "unrecognized arguments: --dry-run; did you mean --dry_run?",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_it_says_which_there_are(capsys):
    assert main([]) == 2
    assert "Translates a checkpoint" in capsys.readouterr().err


def test_as_a_module_nothing_of_tensorflow_is_seen_around_a_result_or_an_error():
    # What the level of the tests' own set-up would hide.
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    run = in_a_process("-m", "bn_tf1", "doctor", SONNET, "nowhere", env=environment)
    assert run.returncode == 2
    assert run.stdout.startswith(f"{SONNET}: checkpoint, step 5\n")
    (line,) = run.stderr.splitlines()
    assert line.startswith("doctor: there is nothing at nowhere")


@pytest.mark.parametrize("command", [[], ["doctor"], ["launch"]])
def test_the_version(command):
    run = in_a_process("-m", "bn_tf1", *command, "--version")
    assert (run.returncode, run.stdout) == (0, f"bn_tf1 {bn_tf1.__version__}\n")


COMMANDS = sorted(p.stem for p in (ROOT / "bn_tf1" / "commands").glob("[a-z]*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_fits_the_screen_and_needs_no_tensorflow(command, tmp_path):
    # The import of TensorFlow takes seconds, and is loud.
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow')")
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(tmp_path)}
    run = in_a_process("-m", "bn_tf1", command, "--help", env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"examples:\n  python -m bn_tf1 {command} " in run.stdout
    assert not [line for line in run.stdout.splitlines() if len(line) > 80]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_can_be_typed(command, monkeypatch):
    module = importlib.import_module(f"bn_tf1.commands.{command}")
    seen = []
    monkeypatch.setattr(module, "run", lambda options: seen.append(options.command))
    for line in module.EXAMPLES:
        main(shlex.split(line, comments=True))
    assert seen == [command] * len(module.EXAMPLES) != []


def test_the_console_script_is_called_by_its_name(tmp_path):
    script = tmp_path / "bn_tf1"
    script.write_text("import sys; from bn_tf1.__main__ import main; sys.exit(main())")
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    run = in_a_process(str(script), "convert", "--help", env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: bn_tf1 convert ")
    assert "examples:\n  bn_tf1 convert " in run.stdout


def in_a_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=str(ROOT),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
