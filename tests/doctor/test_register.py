"""The register of checks: nothing is found that is not in it, and nothing in it is idle."""

import ast
import re

import pytest

from bn_tf1.__main__ import main
from bn_tf1.doctor.findings import CERTAINTIES, GRAVITIES
from bn_tf1.doctor.register import (
    BY_NAME,
    CHECKS,
    by_place,
    found_by,
    general_remedy,
)
from tests import ROOT

GUIDE = ROOT / "bn_tf1" / "doctor" / "README.md"
_TABLE = re.compile(
    r"(?<=<!-- the checks -->\n).*?(?=<!-- end of the checks -->)", re.DOTALL
)


def markdown_tables():
    lines = []
    for place, checks in by_place().items():
        lines += [
            "",
            f"| in a {place} | gravity | what it finds |",
            "| --- | --- | --- |",
        ]
        for check in checks:
            gravities = " or ".join(check.gravities)
            lines.append(f"| `{check.name}` | {gravities} | {check.what} |")
    return "\n".join(lines) + "\n\n"


def write_guide():
    """python -c 'from tests.doctor import test_register as t; t.write_guide()'"""
    text = GUIDE.read_text(encoding="utf-8")
    text = _TABLE.sub(lambda match: markdown_tables(), text)
    GUIDE.write_text(text, encoding="utf-8")


def test_the_table_of_the_guide_is_that_of_the_register():
    (table,) = _TABLE.findall(GUIDE.read_text(encoding="utf-8"))
    assert table == markdown_tables(), f"stale; run {write_guide.__doc__}"


def _sources():
    for path in sorted((ROOT / "bn_tf1").rglob("*.py")):
        if path.name != "register.py":
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def _text(node):
    """The string that a node is, ast.Str on Python 3.7; None for another node."""
    value = getattr(node, "value", getattr(node, "s", None))
    return value if isinstance(value, str) else None


def test_every_check_is_made_somewhere_in_the_doctor():
    told = set()
    for path, tree in _sources():
        if "doctor" in path.parts:
            told |= {_text(node) for node in ast.walk(tree)}
    assert not set(BY_NAME) - told


def test_nobody_makes_a_finding_but_the_register():
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "Finding", f"{path}:{node.lineno}"
                if node.func.id in ("found_by", "_finding") and node.args:
                    name = _text(node.args[0])
                    assert name is None or name in BY_NAME, f"{path}:{node.lineno}"


def test_a_finding_must_fit_its_check():
    parts = {"where": "w", "what": "x"}
    with pytest.raises(KeyError):
        found_by("no-such-check", certainty="certain", **parts)
    with pytest.raises(KeyError):
        found_by("no-update", certainty="certain", **parts)  # its remedy needs a name
    with pytest.raises(ValueError, match="gravity 'note'"):
        found_by("not-finite", gravity="note", certainty="certain", **parts)
    with pytest.raises(ValueError, match="gravity 'error or note'"):
        found_by("never-updated", certainty="certain", **parts)
    finding = found_by("no-update", certainty="certain", name="a/bn", **parts)
    assert finding.gravity == "error"
    assert finding.remedy.endswith("name='a/bn')")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_an_entry_is_complete(check):
    assert re.match(r"[a-z]+(-[a-z]+)+$", check.name)
    assert list(check.gravities) == [g for g in GRAVITIES if g in check.gravities]
    for text in (check.what, check.why, check.remedy):
        assert text[0].isupper() or text.startswith("tf."), text
    assert check.what.endswith(".") and check.why.endswith(".")
    assert len(check.what) < 90, "a line of the table"
    assert "{" not in general_remedy(check).replace("{name: variable}", "")
    assert len(CERTAINTIES) == 3


def test_explain_and_list(capsys):
    assert main(["doctor", "--explain", "no-update"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    check = BY_NAME["no-update"]
    assert all(text in told for text in (check.name, "error", check.what, check.why))
    assert "name=NAME)" in told
    assert main(["doctor", "--list"]) == 0
    told = capsys.readouterr().out
    assert all(check.name in told for check in CHECKS)


def test_a_check_that_is_not_there(capsys):
    assert main(["doctor", "--explain", "never"]) == 1
    assert "is it never-updated?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 2
