"""Runs the blocks of a README as they stand: python -m tests.readme_blocks README.md.

Those fenced as `sh` are run by bash, which stops at the first error; those fenced as
`python` share their names, from the first to the last. `diff` and `text` are only read.
Run it in a copy of the repository: the blocks may write where they stand.

A block that imports one of `_OPTIONAL` is only compiled where that is not installed.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import Iterator, NamedTuple

# Runtimes of exported models: as large as TensorFlow, and no part of the tests.
_OPTIONAL = ("onnxruntime", "openvino")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the line of its fence, its language, its text."""

    line: int
    language: str
    text: str


def blocks_of(readme: pathlib.Path) -> Iterator[Block]:
    content = readme.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(content):
        yield Block(content.count("\n", 0, match.start()) + 1, *match.groups())


def main(readme: str) -> None:
    names = {"__name__": "__main__"}
    for block in blocks_of(pathlib.Path(readme)):
        if block.language in ("sh", "python"):
            print(f"--- {readme}:{block.line}", flush=True)
        if block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        elif block.language == "python":
            # With the line breaks before it a traceback names the line of the README.
            program = compile("\n" * block.line + block.text, readme, "exec")
            missing = _not_installed(block.text)
            if missing:
                print(f"not run: {', '.join(missing)} is not installed", flush=True)
            else:
                exec(program, names)  # noqa: S102


def _not_installed(program: str) -> list[str]:
    imported = [
        alias.name
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    return [
        name
        for name in imported
        if name in _OPTIONAL and importlib.util.find_spec(name) is None
    ]


if __name__ == "__main__":
    main(sys.argv[1])
