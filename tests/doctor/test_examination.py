"""The command `doctor`: kinds of paths, reports and exit codes."""

import html.parser
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import bn_tf1
from bn_tf1.__main__ import main
from bn_tf1.doctor.examination import Examination, LayerRow, Spread, examine
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.reports.machine_readable import json_report
from bn_tf1.doctor.reports.page import html_report
from bn_tf1.doctor.reports.terminal import text_report
from tests.checkpoints import checkpoint_forge as forge

_TRAINED = str(forge.FIXTURES / "trained" / "tensorflow-1.15.5")
_HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e"


@pytest.fixture
def sick(tmp_path):
    values = forge.converged("tf_layers")
    name = "batch_normalization_1/moving_variance"
    values[name] = values[name] * np.float32(-1)
    return forge.write(tmp_path / "sick.ckpt", values)


def test_exit_codes(sick, tmp_path, capsys):
    assert main(["doctor", _TRAINED]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "healthy: 4 batch-norm layers, no findings"
    )
    assert main(["doctor", sick]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "not healthy: 2 batch-norm layers, 1 error"
    assert "error (certain): negative-variance" in out
    assert main(["doctor", str(tmp_path / "nowhere"), _TRAINED, sick]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("doctor: there is nothing at")
    assert captured.out.splitlines()[-1].startswith("not healthy: 6 batch-norm layers")


def test_notes_alone_are_healthy(tmp_path, capsys):
    forge.write(tmp_path / "model.ckpt", forge.converged("keras"))
    assert main(["doctor", str(tmp_path)]) == 0  # no state file
    assert capsys.readouterr().out.splitlines()[-1] == (
        "healthy: 2 batch-norm layers, 1 note"
    )


@pytest.mark.parametrize(
    "path, kind, layers",
    [
        (_TRAINED, "training directory", 4),
        (os.path.join(_TRAINED, "checkpoint"), "training directory", 4),
        (os.path.join(_TRAINED, "model.ckpt"), "checkpoint", 4),
        (os.path.join(_TRAINED, "model.ckpt.index"), "checkpoint", 4),
        (os.path.join(_TRAINED, "model.ckpt.data-00000-of-00001"), "checkpoint", 4),
        (str(forge.FIXTURES / "contrib" / "model.ckpt"), "checkpoint", 2),
        (str(forge.FIXTURES / "contrib" / "model.ckpt.meta"), "graph", 2),
    ],
)
def test_kinds_of_paths(path, kind, layers):
    examination = examine(path)
    assert examination.kind == kind
    assert len(examination.layers) == layers
    assert all(f.gravity != "error" for f in examination.findings)


def test_the_kind_is_told_by_the_content(tmp_path):
    source = forge.FIXTURES / "contrib" / "model.ckpt.meta"
    (tmp_path / "graph.index.txt").write_bytes(source.read_bytes())
    assert examine(str(tmp_path / "graph.index.txt")).kind == "graph"


def test_a_saved_model_and_a_frozen_graph(tmp_path):
    x = tf.placeholder(tf.float32, [None, 4], name="x")
    y = bn_tf1.batch_norm(x, False, name="bn")
    y = tf.identity(y, name="y")
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for variable in tf.global_variables():
            if "moving" in variable.op.name:
                variable.load(np.float32([1, 2, 3, -4]), session)
        saved = str(tmp_path / "saved")
        tf.saved_model.simple_save(session, saved, {"x": x}, {"y": y})
        frozen = tf.graph_util.convert_variables_to_constants(
            session, session.graph_def, ["y"]
        )
    (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
    examination = examine(saved)
    assert (examination.kind, len(examination.layers)) == ("saved_model", 1)
    assert [f.check for f in examination.findings if f.gravity == "error"] == [
        "negative-variance"
    ]
    assert examination.layers[0].epsilon == pytest.approx(1e-3)
    frozen = examine(str(tmp_path / "frozen.pb"))
    assert (frozen.kind, frozen.layers[0].mode) == ("graph", "inference")


def test_json_has_the_documented_keys(sick, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main(["doctor", "--json", sick, nowhere]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report["verdict"] == "unreadable"
    assert [entry["path"] for entry in report["unreadable"]] == [nowhere]
    (examined,) = report["paths"]
    assert (examined["path"], examined["step"]) == (sick, 100_000)
    assert examined["healthy"] is False
    names = [layer["name"] for layer in examined["layers"]]
    assert names == ["batch_normalization", "batch_normalization_1"]
    assert set(examined["layers"][0]) == set(LayerRow._fields)
    assert len(examined["layers"][0]["mean"]["quantiles"]) == 7
    (finding,) = examined["findings"]
    assert set(finding) == set(Finding._fields)
    assert main(["doctor", "--json", _TRAINED]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "healthy"


class _Page(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(sick, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["doctor", sick, _TRAINED, "--html", str(path)]) == 1
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.open
    assert page.tags.count("svg") == 2 * 6  # mean and deviation of each layer
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "negative-variance" in text


def test_the_page_shows_the_course_of_a_run(tmp_path):
    for step in (10, 20, 30):
        values = forge.converged("tf_layers")
        values["global_step"] = np.int64(step)
        for name in values:
            if "moving" in name:
                values[name] = values[name] + np.float32(step / 100)
        forge.write(tmp_path / f"model.ckpt-{step}", values)
    page = _Page(html_report([examine(str(tmp_path))]))
    assert page.tags.count("polyline") == 2 * 2


def _hostile_examination():
    spread = Spread((float("nan"),) * 7, 3)
    wide = Spread((-1e308, -1e308, 0.0, 0.0, 1.0, 1e308, 1e308), 3)
    rows = (
        LayerRow(_HOSTILE, kind=_HOSTILE, mean=spread, deviation=wide, channels=1),
        LayerRow("n" * 500, mean=wide, deviation=wide, history=((wide, wide),) * 3),
        LayerRow(""),
    )
    finding = Finding("check", "error", "certain", *[_HOSTILE] * 5)
    return Examination(_HOSTILE, "checkpoint", rows, (finding,), step=1)


def test_names_are_escaped_in_every_report():
    examination = _hostile_examination()
    page = _Page(html_report([examination], [(_HOSTILE, _HOSTILE)]))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = text_report([examination])
    assert "\x1b" not in text
    assert "\u202e" not in text
    report = json.loads(json_report([examination], [(_HOSTILE, _HOSTILE)]))
    assert report["paths"][0]["layers"][0]["name"] == _HOSTILE
    assert report["paths"][0]["layers"][0]["mean"]["quantiles"] == [None] * 7


def test_hundreds_of_layers_stay_readable():
    rows = tuple(LayerRow(f"block_{i}/bn", channels=64) for i in range(500))
    findings = tuple(
        Finding(
            "dead-channels", "warning", "certain", f"block_{i}/bn", "w", "x", "y", "z"
        )
        for i in range(30)
    )
    healthy = text_report([Examination("path", "graph", rows, ())])
    assert len(healthy.splitlines()) < 10
    assert "500 more layers, 500 of all without a finding" in healthy
    text = text_report([Examination("path", "graph", rows, findings)])
    assert len(text.splitlines()) < 60
    assert "... and 22 more layers" in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("columns", [80, 60, 1000, 0])
def test_findings_are_folded_to_the_terminal(columns):
    examined = examine(str(forge.FIXTURES / "contrib"))
    report = text_report([examined], columns)
    folded = [line for line in report.splitlines() if line.startswith(" " * 10)]
    assert folded and "not-converged" in report
    width = max(40, min(columns, 96))
    assert all(len(line) <= width or " " not in line.strip() for line in folded)
    assert report.split() == text_report([examined]).split()


def test_lines_fit_a_terminal():
    text = text_report([examine(str(forge.FIXTURES / "contrib"))])
    for line in text.splitlines():
        assert len(line) <= 100 or " " not in line.strip()


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=400), name=st.sampled_from(["x", "x.meta", "x.pb"]))
def test_random_bytes_are_unreadable_in_one_line(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    try:
        examine(str(path))
    except ValueError as error:
        assert str(path) in str(error)


def test_the_first_format_is_named(tmp_path, capsys):
    values = {"bn/moving_mean": np.float32([1, 2]), "bn/gamma": np.float32([1, 2])}
    path = forge.write(tmp_path / "model.ckpt", values, write_version=1)
    assert main(["doctor", path]) == 2
    assert "is a checkpoint in TensorFlow's first format" in capsys.readouterr().err
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    assert [f.check for f in examine(str(tmp_path)).findings] == ["first-format"]


def test_as_a_module_on_nothing(tmp_path):
    command = [sys.executable, "-m", "bn_tf1", "doctor", str(tmp_path)]
    root = str(forge.FIXTURES.parent.parent)
    run = subprocess.run(command, cwd=root, capture_output=True, check=False)
    assert run.returncode == 2
    assert b"Traceback" not in run.stderr
    assert run.stderr.decode().splitlines()[-1].startswith("doctor: directory ")
