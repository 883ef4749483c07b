"""Runs the operation's tests with a sanitizer of the compiler.

    python -m tests.compiled.sanitized address       (or undefined, thread)

Exit code: that of the tests; a sanitizer that finds something in the operation fails them.
TensorFlow itself is not compiled with the sanitizer: what that reports of it is suppressed.
"""

import os
import subprocess
import sys

from bn_tf1.compiled import building
from tests import ROOT

_LIBRARIES = {
    "address": "libasan.so",
    "undefined": "libubsan.so",
    "thread": "libtsan.so",
}
_OPTIONS = {
    # Python and TensorFlow keep memory until they end.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:suppressions="
    + str(ROOT / "tests" / "compiled" / "handed_over.supp"),
}


def main(sanitizer):
    """Builds, tests, and returns the exit code."""
    library = building.build(print, sanitizer)
    # The sanitizer looks for what throws exceptions when it starts.
    runtime = ":".join(map(_path_of, (_LIBRARIES[sanitizer], "libstdc++.so.6")))
    environment = dict(
        os.environ, LD_PRELOAD=runtime, BN_TF1_SANITIZED=library, **_OPTIONS
    )
    # The number of threads needs processes, which build for themselves.
    chosen = ["-k", "not(number_of_threads)"]
    tests = ["-q", "-n0", *chosen, "tests/compiled/test_kernel.py"]
    code = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=str(ROOT),
        env=environment,
        check=False,
    ).returncode
    print(f"{sanitizer}: {'clean' if code == 0 else f'exit code {code}'}")
    return code


def _path_of(library):
    found = subprocess.run(
        ["g++", f"-print-file-name={library}"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return found.stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in _LIBRARIES]:
        sys.exit(f"usage: python -m tests.compiled.sanitized {'|'.join(_LIBRARIES)}")
    sys.exit(main(sys.argv[1]))
