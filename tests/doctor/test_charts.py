"""The charts of the pages: what is drawn of curves that are short, broken or hostile."""

import re

from bn_tf1.doctor.reports import charts
from bn_tf1.doctor.reports.charts import Series


def drawn(*series):
    return charts.lines(series, title="loss", x_name="step")


def test_a_single_point_is_a_dot():
    page = drawn(Series("eval", [(50, 1.0)]), Series("train", [(0, 0.5), (100, 2.0)]))
    shapes = re.findall(r'class="(dot|line) [^>]*d="([^"]*)"', page)
    assert [kind for kind, _ in shapes] == ["dot", "line"]
    assert re.fullmatch(r"M\d+ \d+h0", shapes[0][1])


def test_a_gap_is_not_bridged():
    points = [(0, 1.0), (25, 2.0), (50, float("nan")), (75, 2.0), (100, 1.0)]
    (shape,) = re.findall(r'class="line [^>]*d="([^"]*)"', drawn(Series("a", points)))
    assert shape.count("M") == 2


def test_names_are_escaped():
    assert "<script>" not in drawn(Series("<script>", [(0, 1.0), (1, 2.0)]))
