"""The page of a run: its curves, its layers, the verdict; also of other programs' runs."""

import html.parser
import os
import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.__main__ import main
from bn_tf1.jobs import evaluation
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.reporting import event_curves, run_page
from bn_tf1.jobs.reporting.live_report import LiveReport
from bn_tf1.jobs.training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, evaluated at its end; for reading only."""
    model_dir = str(tmp_path_factory.mktemp("runs") / "one")
    config = Config(
        model_dir=model_dir, model="mlp", max_steps=12, summary_steps=3, log_steps=4
    )
    train(config)
    with open(os.path.join(model_dir, "report.html"), encoding="utf-8") as file:
        before = file.read()
    list(evaluation.evaluate(evaluation.Request(model_dir, run_once=True)))
    with open(os.path.join(model_dir, "report.html"), encoding="utf-8") as file:
        return model_dir, before, file.read()


class _Text(html.parser.HTMLParser):
    """The words of a page, and the balance of its elements."""

    def __init__(self, page):
        super().__init__()
        self.words, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.words.append(data)


def _titles(page):
    return re.findall("<figcaption>(.*?)</figcaption>", page)


def _write_events(folder, curves, *, restarted_at=None):
    """Event files as another program writes them: (step, value) by tag."""
    with tf.summary.FileWriter(str(folder)) as writer:
        if restarted_at is not None:
            log = tf.SessionLog(status=tf.SessionLog.START)
            writer.add_session_log(log, restarted_at)
        for tag, points in curves.items():
            for step, value in points:
                summary = tf.Summary(
                    value=[tf.Summary.Value(tag=tag, simple_value=value)]
                )
                writer.add_summary(summary, step)


def test_a_run_leaves_a_page_with_everything_in_it(trained):
    _, before, page = trained
    text = " ".join(_Text(page).words)
    assert _titles(page)[:4] == ["Loss", "Accuracy", "Learning rate", "Speed"]
    for layer in ("layer1", "layer2", "layer3"):
        for statistic in ("mean", "deviation", "distance of the batch"):
            assert f"{layer}: {statistic}" in _titles(page)
    for words in ("eval", "train", "moving", "batch", "The doctor", "not-converged"):
        assert words in text
    # The training job knew nothing of the evaluation, and evaluation drew it anew.
    assert "evaluation accuracy, step 12" not in before
    assert "evaluation accuracy, step 12" in text
    # What it was started with, without what anybody starts with.
    assert "--max_steps" in text
    assert "--momentum" not in text
    assert len(page) < 60_000


def test_the_page_needs_nothing_beside_it(trained):
    _, _, page = trained
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=", page)
    assert "prefers-color-scheme:dark" in page


def test_the_curves_are_those_of_the_event_files(trained):
    model_dir, _, _ = trained
    curves = run_page.read_run(model_dir).curves
    assert [step for step, _ in curves["train"]["loss"]] == [1, 3, 6, 9, 12]
    assert [step for step, _ in curves["train"]["examples_per_second"]] == [4, 8, 12]
    assert set(curves["eval"]) == {"loss", "accuracy"}


def test_the_command_makes_it_again_and_compares(trained, tmp_path, capsys):
    model_dir, _, _ = trained
    _write_events(tmp_path / "other", {"loss": [(1, 2.0), (9, 1.0)]})
    output = tmp_path / "both.html"
    command = ["report", model_dir, "--compare", str(tmp_path / "other")]
    assert main([*command, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    page = output.read_text(encoding="utf-8")
    assert "one: train</span>" in page and "one: eval</span>" in page
    assert "other: train</span>" in page
    assert _titles(page).count("Loss") == 1


def test_a_run_of_another_program(tmp_path):
    _write_events(tmp_path, {"total_loss": [(0, 3.0), (10, 1.0)], "a<b/lr": [(0, 0.1)]})
    _write_events(tmp_path / "val", {"total_loss": [(10, 1.5)]})
    page = run_page.page([run_page.read_run(str(tmp_path))])
    _Text(page)
    assert _titles(page) == ["a&lt;b/lr", "total_loss"]
    assert "val</span>" in page


def test_values_that_are_not_finite_break_a_curve(tmp_path):
    points = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]
    _write_events(tmp_path, {"loss": points})
    page = run_page.page([run_page.read_run(str(tmp_path))])
    assert "nan" not in re.findall('class="line[^>]*>', page)[0]


def test_a_restart_drops_what_came_after_it_before(tmp_path):
    _write_events(tmp_path, {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]})
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.1000.host")
    _write_events(tmp_path, {"loss": [(2, 20.0)]}, restarted_at=2)
    assert event_curves.curves_in(str(tmp_path)) == {"loss": [(1, 1.0), (2, 20.0)]}


def test_a_torn_tail_and_garbage_are_passed_over(tmp_path):
    _write_events(tmp_path, {"loss": [(1, 1.0), (2, 2.0)]})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "events.out.tfevents.5.x").write_bytes(np.random.bytes(500))
    assert event_curves.curves_in(str(tmp_path)) == {"loss": [(1, 1.0)]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere is not there: give"),
        ("runs", "there are runs in it: {}/runs/a"),
    ],
)
def test_a_folder_without_curves_is_told(tmp_path, capsys, name, words):
    _write_events(tmp_path / "runs" / "a" / "train", {"loss": [(1, 1.0)]})
    assert main(["report", str(tmp_path / name)]) == 1
    assert words.format(tmp_path) in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    _write_events(tmp_path, {"loss": [(1, 1.0)]})
    output = str(tmp_path / "nowhere" / "x.html")
    assert main(["report", str(tmp_path), "--output", output]) == 1
    assert f"report: {output} cannot be written: No such" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    _write_events(tmp_path, {"loss": [(1, 1.0)]})
    (tmp_path / "report.html.partial").mkdir()
    report = LiveReport(str(tmp_path))
    report.write()
    report.write()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/report.html cannot be written: Is a")


def test_many_layers_stay_a_small_page(tmp_path):
    points = [(step, np.sin(step)) for step in range(0, 100_000, 50)]
    tags = ["moving_deviation", "batch_deviation", "mean_distance"]
    layers = {f"block{i}/{tag}": points for i in range(20) for tag in tags}
    run = run_page.RunCurves("runs/x", {"train": {"loss": points, **layers}})
    page = run_page.page([run])
    assert "8 more layers" in page
    assert len(page) < 150_000
