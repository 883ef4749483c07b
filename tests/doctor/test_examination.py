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
from bn_tf1.doctor.examination import Examination, Unchecked, examine
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.layer_rows import LayerRow, Spread
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
        "healthy: 4 batch-norm layers, 1 note"
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
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(sick, tmp_path, capsys):
    path = tmp_path / "report.html"
    others = tmp_path / "report.html.partial"
    others.write_text("somebody else's")
    assert main(["doctor", sick, _TRAINED, "--html", str(path)]) == 1
    assert others.read_text() == "somebody else's"
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.open
    # The legend, and mean and deviation of each layer.
    assert page.tags.count("svg") == 2 + 2 * 6
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
    curves = [value for name, value in page.attributes if value and "line s" in value]
    assert len(curves) == 2 * 2


def _hostile_examination():
    spread = Spread((float("nan"),) * 7, 3)
    wide = Spread((-1e308, -1e308, 0.0, 0.0, 1.0, 1e308, 1e308), 3)
    rows = (
        LayerRow(_HOSTILE, kind=_HOSTILE, mean=spread, deviation=wide, channels=1),
        LayerRow("n" * 500, mean=wide, deviation=wide, history=((wide, wide),) * 3),
        LayerRow(""),
    )
    finding = Finding("check", "error", "certain", *[_HOSTILE] * 5)
    unchecked = (Unchecked((_HOSTILE,), _HOSTILE),)
    return Examination(_HOSTILE, "checkpoint", rows, (finding,), 1, unchecked)


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


def _alike(count, name="block_{}/bn", **parts):
    return tuple(LayerRow(name.format(i), channels=64, **parts) for i in range(count))


def _dead(count):
    names = [f"block_{i}/bn" for i in range(count)]
    texts = "w", "x", "y", "z"
    return tuple(
        Finding("dead-channels", "warning", "certain", n, *texts) for n in names
    )


def test_layers_that_are_alike_are_one_row_and_a_count():
    examination = Examination("path", "graph", _alike(60, kind="fused"), ())
    lines = text_report([examination]).splitlines()
    (row,) = [line for line in lines if "block_*/bn" in line]
    assert row.split() == ["block_*/bn", "60", "64", "fused"]
    every = text_report([examination], every_layer=True)
    assert sum(f"block_{i}/bn" in every for i in range(60)) == 60
    assert "--all" not in every


def test_layers_with_other_findings_or_settings_are_rows_of_their_own():
    rows = _alike(500, decay=0.99) + _alike(1, "odd/bn", decay=0.5)
    text = text_report([Examination("path", "graph", rows, _dead(30))])
    assert len(text.splitlines()) < 60
    table = [line.split() for line in text.splitlines() if "64" in line]
    assert sorted(row[-2:] for row in table) == [
        ["64", "0.5"],
        ["64", "0.99"],
        ["64", "0.99"],
    ]
    assert ["!", "block_*/bn", "30", "64", "0.99"] in table
    assert "... and 27 more layers; --all lists each" in text


@pytest.mark.parametrize("columns", [44, 60, 80, 1000])
def test_no_line_is_wider_than_the_terminal(columns):
    scope = "a/rather/long/scope/of/a/network"
    spread = Spread((-1.2345e-05,) * 6 + (1.2345e05,), 3)
    rows = tuple(
        LayerRow(
            f"{scope}/{kind}_{i}/conv/BatchNorm", kind, 512, 0.1 * i, 1e-5 * i
        )._replace(mode="inference" * i, mean=spread, deviation=spread)
        for i in range(2)
        for kind in ("fused", "composed")
    )
    text = text_report([Examination("path", "graph", rows, ())], columns)
    assert max(map(len, text.splitlines())) <= columns
    assert text.count("long/scope") == 1  # what they have in common is told once
    for row in rows:
        shown = row.name[len(scope) + 1 :]
        assert any(shown[-n:] in text for n in (len(shown), 8))
    names = [line[2:].split()[0] for line in text.splitlines() if "BatchNorm" in line]
    assert len(set(names)) == 4


@pytest.mark.parametrize("columns", [80, 60, 1000, 0])
def test_findings_are_folded_to_the_terminal(columns):
    examined = examine(str(forge.FIXTURES / "contrib"))
    report = text_report([examined], columns)
    folded = [line for line in report.splitlines() if line.startswith(" " * 10)]
    assert folded and "not-converged" in report
    width = max(40, min(columns, 96))
    assert all(len(line) <= width or " " not in line.strip() for line in folded)
    findings = report[report.index("warning (likely)") :]
    assert findings.split() == text_report([examined]).split()[-len(findings.split()) :]


def test_colours_are_on_a_terminal_alone(sick, capsys, monkeypatch):
    main(["doctor", sick])
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    main(["doctor", sick])
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "\x1b" not in plain and "error (certain): negative-variance" in plain
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor", sick])
    assert capsys.readouterr().out == plain


def test_what_was_not_checked_is_told(tmp_path):
    values = forge.converged("tf_layers")
    del values["global_step"]
    (told, graph) = examine(forge.write(tmp_path / "a.ckpt", values)).unchecked
    assert told == (("not-converged",), "no global step is known")
    assert "update-not-run" in graph.checks and "no a.ckpt.meta" in graph.reason
    text = text_report([examine(str(tmp_path / "a.ckpt"))])
    assert "not checked: not-converged: no global step is known" in text
    (values_of,) = examine(
        str(forge.FIXTURES / "contrib" / "model.ckpt.meta")
    ).unchecked
    assert "negative-variance" in values_of.checks


def test_the_page_of_sixty_layers_is_small(tmp_path):
    spread = Spread((-1.2, -1.0, -0.3, 0.01, 0.4, 1.1, 1.9), 1000)
    history = tuple((spread, spread) for _ in range(20))
    name = "resnet_v1_50/block{}/unit_1/bottleneck_v1/conv1/BatchNorm"
    rows = _alike(60, name, mean=spread, deviation=spread, history=history)
    page = html_report([Examination("runs/resnet", "training directory", rows, ())])
    assert len(page.encode()) < 80_000
    assert "prefers-color-scheme:dark" in page and "@media(max-width" in page
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC, bn_tf1", page)
    labels = re.findall(r'left:[\d.]+%">([^<]+)<', page)
    assert {"0", "1", "\N{MINUS SIGN}1"} <= set(labels)  # numbers on the axes


def test_a_page_that_cannot_be_written_loses_nothing(sick, tmp_path, capsys):
    for target in (tmp_path / "nowhere" / "report.html", tmp_path):
        assert main(["doctor", sick, "--html", str(target)]) == 2
        told = capsys.readouterr()
        assert "negative-variance" in told.out and told.out.count("not healthy") == 1
        assert f"doctor: {target} cannot be written" in told.err
    assert not list(tmp_path.glob(".report*"))


def test_a_folder_of_runs_offers_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        forge.write(tmp_path / name / "model.ckpt-3", {"x": np.float32([1])})
    (tmp_path / "other").mkdir()
    offered = f"2 in it have: {tmp_path / 'a'}, {tmp_path / 'b'}: give"
    with pytest.raises(ValueError, match=re.escape(offered)):
        examine(str(tmp_path))


def test_a_mistyped_checkpoint_lists_those_that_are_there(tmp_path):
    for step in (9, 10):
        forge.write(tmp_path / f"model.ckpt-{step}", {"x": np.float32([1])})
    with pytest.raises(
        ValueError, match="there are: model.ckpt-9, model.ckpt-10: give"
    ):
        examine(str(tmp_path / "model.ckpt-100"))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"PK\x03\x04" + b"\0" * 26 + b"archive/data.pkl", "a model of PyTorch"),
        (b"\x80\x02}q\x00.", "a pickle"),
        ("naïve text\nof two lines".encode(), "a text file"),
        (b"\x1c\0\0\0TFL3\0", "a model of TensorFlow Lite"),
    ],
)
def test_another_format_is_told_in_plain_words(tmp_path, content, what):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match=f"is {what}") as caught:
        examine(str(tmp_path / "model"))
    assert not re.search(r"field|wire|varint|kind \d", str(caught.value))


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
