"""The guides: every command and every program in a README runs as it stands.

So does the installation that they begin with.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests import ROOT
from tests.readme_blocks import blocks_of

# What is made here and does not belong to the project.
_MADE = shutil.ignore_patterns(
    ".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "venv*"
)


def _readmes():
    for folder, subfolders, files in os.walk(str(ROOT)):
        subfolders[:] = set(subfolders) - _MADE(folder, subfolders)
        if "README.md" in files:
            yield str((pathlib.Path(folder) / "README.md").relative_to(ROOT))


READMES = sorted(_readmes())
RUN = [
    name
    for name in READMES
    if {b[1] for b in blocks_of(ROOT / name)} & {"sh", "python"}
]


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository, and the environment of somebody who has installed it.

    `python` and `python3` are this Python. What pip would fetch is there: a virtual
    environment that a block makes finds it, too, and nothing is downloaded. Pytest
    collects one file of the tests, and does not run this test in itself.
    """
    shutil.copytree(str(ROOT), str(tmp_path / "clone"), ignore=_MADE)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        python = tmp_path / "bin" / name
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "PIP_", "VIRTUAL_ENV", "TF_CPP_"))
    }
    environment.update(
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=sysconfig.get_path("purelib"),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # Its way to say: without isolation.
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTEST_ADDOPTS="--collect-only --quiet --numprocesses=0 tests/test_house.py",
    )
    return str(tmp_path / "clone"), environment


@pytest.mark.parametrize("readme", RUN)
def test_every_block_runs_as_it_stands(readme, clone):
    folder, environment = clone
    run = subprocess.run(
        [sys.executable, "-m", "tests.readme_blocks", readme],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout


def test_what_is_installed_holds_all_that_the_package_has(clone, tmp_path):
    """The guides, the stub and what else is no Python, too."""
    folder, environment = clone
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    run = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    package = pathlib.Path(folder) / "bn_tf1"
    files = [path for path in package.rglob("*") if path.is_file()]
    with zipfile.ZipFile(str(wheel)) as archive:
        names = set(archive.namelist())
    assert {str(path.relative_to(folder)) for path in files} <= names


@pytest.mark.parametrize("readme", READMES)
def test_every_block_says_whether_it_runs(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    languages = re.findall(r"^```(.*)$", text, re.MULTILINE)[::2]
    assert set(languages) <= {"sh", "python", "diff", "text"}


@pytest.mark.parametrize("readme", READMES)
def test_every_link_leads_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / readme).parent.joinpath(target).exists(), target


# In a process where nothing else has imported parts of the library.
NAMES_PROBE = """
import functools, sys
import bn_tf1

for name in sys.argv[1:]:
    functools.reduce(getattr, name.split(".")[1:], bn_tf1)
"""


def test_what_the_guides_name_works_after_import_bn_tf1():
    texts = [(ROOT / readme).read_text(encoding="utf-8") for readme in READMES]
    # Not what is imported by that name.
    pattern = r"(?<!from )(?<!import )\bbn_tf1(?:\.\w+)+"
    names = {name for text in texts for name in re.findall(pattern, text)}
    assert "bn_tf1.make_train_op" in names
    run = subprocess.run(
        [sys.executable, "-c", NAMES_PROBE, *sorted(names)],
        cwd=str(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_first_page_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
