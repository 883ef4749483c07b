"""What can be missing for a build is said, and what others may have written is not loaded."""

import os
import shutil
import stat

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import compiled
from bn_tf1.compiled import building, library


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """A process that has loaded nothing, with an empty cache."""
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_without_it_the_layer_names_the_command(unloaded):
    assert not compiled.is_built()
    x = tf.zeros([4, 3])
    bn_tf1.batch_norm(x, False, kernel="compiled")  # needs none
    with pytest.raises(
        ValueError, match="not built for .*: run `python -m bn_tf1 build`"
    ):
        bn_tf1.batch_norm(x, True, kernel="compiled")


def _compiler(folder, version, exit_code=0):
    """A program that says that it is a compiler, and fails with `exit_code`."""
    program = folder / "some-c++"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "g++ {version}";;\n'
        f"-dumpversion) echo {version};; *) echo 'x.cc:1: error: oh' >&2; "
        f"exit {exit_code};; esac\n"
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("version", "exit_code", "message"),
    [
        ("4.8.5", 0, r"some-c\+\+ is too old: g\+\+ 4.8.5; TensorFlow .* needs C\+\+1"),
        ("12.2.0", 1, r"does not compile it \(exit code 1\):\nx.cc:1: error: oh"),
    ],
)
def test_a_compiler_that_cannot(version, exit_code, message, unloaded, monkeypatch):
    monkeypatch.setenv("CXX", _compiler(unloaded, version, exit_code))
    with pytest.raises(building.BuildError, match=message):
        building.build(print)
    assert not compiled.is_built()


def test_what_is_missing_is_named(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        building.BuildError, match="'no-such-compiler', which is not on"
    ):
        building.build(print)
    monkeypatch.setenv("CXX", _compiler(unloaded, "12.2.0"))
    (unloaded / "cache").write_text("a file")
    with pytest.raises(building.BuildError, match="cannot be written.*XDG_CACHE_HOME"):
        building.build(print)
    monkeypatch.setattr(tf.sysconfig, "get_include", lambda: str(unloaded))
    with pytest.raises(building.BuildError, match="has no headers here"):
        building.build(print)


def test_what_others_can_write_is_not_loaded(cache, tmp_path, monkeypatch):
    # Not the folder itself, which other processes load from.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", [])
    folder = library.folder()
    shutil.copytree(str(cache / "bn_tf1"), str(tmp_path / "bn_tf1"))
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    os.chmod(folder, 0o770)
    with pytest.raises(compiled.NotBuiltError, match="mode 770, open to others"):
        compiled.load()


def test_a_second_build_finds_the_first(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    said = []
    building.build(said.append)
    assert len(said) == 1
    assert said[0].endswith("is there already")


def test_a_build_that_ends_makes_room_for_the_next(cache, monkeypatch):
    """Also while what it raised, or it itself, is still held by somebody."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    locks, make = [], building.filelock.FileLock

    def kept(path):
        locks.append(make(path))
        return locks[-1]

    monkeypatch.setattr(building.filelock, "FileLock", kept)
    building.build(print)
    assert [lock.is_locked for lock in locks] == [False]
