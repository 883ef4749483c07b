"""Compiles the operation for the TensorFlow that is installed, into the user's cache.

Contract: what is in the cache is whole: a library is compiled beside its place and moved
there. Two builds at once take turns, and the second finds what the first has made.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import Callable, NamedTuple, Sequence

import filelock
import tensorflow.compat.v1 as tf

from bn_tf1.compiled import library

# What TensorFlow's headers need, by whether they are those of 1.15: the standard of C++, and
# the first version of GNU's and of LLVM's compiler that has enough of it.
_STANDARDS = {True: ("c++11", (5,), (6,)), False: ("c++17", (9,), (9,))}
# One function for several processors: the first of these that the compiler takes. The
# second is for GNU's before 12.
_CLONES = (
    '"arch=x86-64-v4","arch=x86-64-v3","default"',
    '"avx512f","avx2","default"',
)
_SHOWN = 12  # lines of a compiler's complaint


class BuildError(ValueError):
    """What is missing for a build, or went wrong in it, and what to do."""


class MissingError(BuildError):
    """There is no compiler, or none that is new enough, or there are no headers."""


class Compiler(NamedTuple):
    """A C++ compiler.

    Attributes:
        command: how it is called.
        version: what it says of itself, a line.
        flags: what it takes of what makes the operation fast.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]


def build(say: Callable[[str], None], sanitizer: str | None = None) -> str:
    """Compiles the operation, unless that is done already; returns the library's path.

    Args:
        say: is told what happens, a line at a time.
        sanitizer: "address", "undefined" or "thread": compiles into a temporary folder,
            with what finds mistakes in the source.

    Raises:
        MissingError: there is no compiler, or it is too old; TensorFlow has no headers.
        BuildError: the folder cannot be written, or the source does not compile.
        bn_tf1.compiled.NotBuiltError: others can write to the folder.
    """
    compiler, headers = _compiler(), _headers()
    if sanitizer is not None:
        path = os.path.join(tempfile.mkdtemp(prefix="bn_tf1_"), "batch_norm.so")
        flags = [f"-fsanitize={sanitizer}", "-O1", "-g", "-fno-omit-frame-pointer"]
        if sanitizer == "undefined":
            # With it g++ does not take TensorFlow's headers (GCC bug 71962).
            flags.append(
                "-fno-sanitize=null,nonnull-attribute,returns-nonnull-attribute"
            )
        # Clones are chosen when the library is loaded, before a sanitizer has started: it
        # would end the process.
        plain = compiler._replace(flags=())
        _compile(plain, headers, path, say, flags)
        return path
    place = _made_folder()
    # With the flags that CXX may have, but not where the compiler lies: that tells nothing.
    known = (compiler.command[1:], *compiler[1:])
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    path = os.path.join(place, f"batch_norm-{name}.so")
    lock = filelock.FileLock(os.path.join(place, "lock"))
    # First without waiting, so that who has to wait for half a minute learns why.
    try:
        turn = lock.acquire(timeout=0)
    except filelock.Timeout:
        say("waiting for another build")
        turn = lock.acquire()
    with turn:
        if os.path.exists(path):
            say(f"{path} is there already")
            return path
        # Of a build that was killed.
        for old in [n for n in os.listdir(place) if n.endswith(".part")]:
            os.remove(os.path.join(place, old))
        _compile(compiler, headers, path + ".part", say)
        # A linker follows the umask, which often lets others read.
        os.chmod(path + ".part", 0o700)
        os.replace(path + ".part", path)
        # One of another compiler would else be taken for it.
        for old in os.listdir(place):
            if old.endswith(".so") and old != os.path.basename(path):
                os.remove(os.path.join(place, old))
    say(f"wrote {path}")
    return path


def _compiler():
    # What make and CMake take, too. g++ comes first: it alone clones the functions.
    asked = os.environ.get("CXX")
    try:
        candidates = [shlex.split(asked)] if asked else [["g++"], ["c++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"CXX is {asked!r}, which is no command: {error}") from error
    command = next((c for c in candidates if c and shutil.which(c[0])), None)
    if command is None:
        what = f"CXX is {asked!r}, which is" if asked else "g++, c++ and clang++ are"
        raise MissingError(
            f"there is no C++ compiler: {what} not on PATH; install one (Debian and "
            "Ubuntu: apt install g++; conda: conda install gxx; macOS: xcode-select "
            "--install), or set CXX to the command of one"
        )
    version = _said(command, "--version").partition("\n")[0].strip()
    # "12" or "12.2.0", as the distribution likes it: a tuple compares with either.
    number = tuple(map(int, re.findall(r"\d+", _said(command, "-dumpversion"))))
    standard, gnu, llvm = _STANDARDS[tf.version.VERSION.startswith("1.")]
    least = llvm if "clang" in version.lower() else gnu
    if not number:
        raise BuildError(f"{command[0]} is no C++ compiler: it tells no -dumpversion")
    if number < least:
        raise MissingError(
            f"{shlex.join(command) if hasattr(shlex, 'join') else ' '.join(command)} is too "
            f"old: {version or number}; TensorFlow {tf.version.VERSION} needs "
            f"{standard.upper()}, which version {least[0]} has: install a newer one, or set "
            "CXX to the command of one"
        )
    return Compiler(tuple(command), version, tuple(_fast_flags(command)))


def _said(command, *flags):
    done = subprocess.run(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.stdout


def _fast_flags(command):
    """Those of vectors and of clones that the compiler takes for this processor."""
    flags = ["-mprefer-vector-width=512"]
    if not _takes(command, flags, "int one() { return 1; }"):
        flags = []
    for clones in _CLONES:
        attribute = f"__attribute__((target_clones({clones})))"
        if _takes(command, [], f"{attribute} int one() {{ return 1; }}"):
            return [*flags, f"-DBN_TF1_CLONES={clones}"]
    return flags


def _takes(command, flags, source):
    # Asked, not looked up by version: vendors backport, and -Werror turns what a compiler
    # ignores with a warning into a no. Linked, since clones need help from the linker.
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [*command, *flags, "-Werror", "-fPIC", "-shared", "-xc++", "-"]
            + ["-o", os.path.join(place, "one.so")],
            input=source.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    return done.returncode == 0


def _headers():
    headers = tf.sysconfig.get_include()
    wanted = os.path.join(headers, "tensorflow", "core", "framework", "op_kernel.h")
    if not os.path.exists(wanted):
        raise MissingError(
            f"TensorFlow {tf.version.VERSION} has no headers here: there is no {wanted}; "
            "install the wheel of PyPI, which brings them"
        )
    return headers


def _made_folder():
    place = library.folder()
    try:
        for path in (library.cache(), place):
            os.makedirs(path, mode=0o700, exist_ok=True)
            library.check_private(path)
        # Who is root may write where a read-only file system does not: only trying tells.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise BuildError(
            f"{error.filename or place} cannot be written: {error.strerror}; set "
            "XDG_CACHE_HOME to a folder of yours that can"
        ) from error
    return place


def _compile(
    compiler: Compiler,
    headers: str,
    path: str,
    say: Callable[[str], None],
    more: Sequence[str] = (),
) -> None:
    say(f"compiling for TensorFlow {tf.version.VERSION} with {compiler.version}")
    standard = _STANDARDS[tf.version.VERSION.startswith("1.")][0]
    command = [*compiler.command, *library.FLAGS, *compiler.flags, f"-std={standard}"]
    # As a system's headers, for warnings in TensorFlow's are not ours to mend.
    command += [f"-isystem{headers}", *tf.sysconfig.get_compile_flags(), *more]
    command += [library.SOURCE, "-o", path, *tf.sysconfig.get_link_flags()]
    # There TensorFlow's symbols are found when the library is loaded.
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    # Not a pipe: nobody reads while the time is told, and a full one would stop the compiler.
    with tempfile.TemporaryFile(mode="w+") as complaints:
        process = subprocess.Popen(command, stderr=complaints)
        waited = 0
        try:
            while True:
                try:
                    exit_code = process.wait(timeout=5)
                    break
                except subprocess.TimeoutExpired:
                    waited += 5
                    say(f"... {waited} s")
        finally:
            process.kill()  # where Ctrl-C ends the wait; of one that has ended, nothing
        complaints.seek(0)
        lines = complaints.read().splitlines()
    if exit_code != 0:
        told = [line for line in lines if "error" in line] or lines
        raise BuildError(
            f"{compiler.version} does not compile it (exit code {exit_code}):\n"
            + "\n".join(told[:_SHOWN])
        )
