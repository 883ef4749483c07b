"""The house: rooms that import downwards only, names that say one thing, one public face."""

import ast
import collections
import importlib
import pydoc
import re
import subprocess
import sys
import types

import pytest

import bn_tf1
from tests import ROOT

PACKAGE = ROOT / "bn_tf1"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# From the ground up. A room imports from those before it in its own column: the left one
# is the library proper, the right one works on what is on disk.
CORE = (
    "statistics",
    "compiled",
    "",
    "train_step",
    "layers",
    "slim",
    "installation",
    "workers",
)
ON_DISK = ("formats", "checkpoints", "graphs", "population", "serving", "doctor")
ABOVE_ALL = ("__init__", "jobs", "commands", "__main__")
MOST_MODULES = 15


def room_of(dotted):
    """The room of a module: "" for what lies in bn_tf1/ itself."""
    parts = dotted.split(".")[1:]
    if not parts or parts == ["__main__"]:
        return parts[0] if parts else "__init__"
    return parts[0] if (PACKAGE / parts[0]).is_dir() else ""


def imports_of(path):
    """The modules of bn_tf1 that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                is_module = (
                    ROOT.joinpath(*dotted.split(".")).with_suffix(".py").exists()
                )
                is_room = ROOT.joinpath(*dotted.split(".")).is_dir()
                yield dotted if is_module or is_room else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def dotted_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def may_import(room, other):
    if room in ABOVE_ALL:
        return other not in ABOVE_ALL or ABOVE_ALL.index(other) <= ABOVE_ALL.index(room)
    if room == other:
        return True
    for column in (CORE, ON_DISK):
        if room in column and other in column:
            return column.index(other) < column.index(room)
    return room in ON_DISK and other in CORE


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_imports_point_downwards(path):
    room = room_of(dotted_name(path))
    for imported in imports_of(path):
        if imported.split(".")[0] in ("train", "eval"):
            pytest.fail(f"{path} imports the script {imported}")
        if imported.split(".")[0] != "bn_tf1":
            continue
        other = room_of(imported)
        assert may_import(room, other), f"{path} imports {imported}"


def test_no_folder_has_more_modules_than_one_keeps_in_the_head():
    counts = collections.Counter(
        path.parent for path in MODULES if path.stem != "__init__"
    )
    assert not {folder: n for folder, n in counts.items() if n > MOST_MODULES}


@pytest.mark.parametrize(
    "first_page",
    [
        path
        for path in MODULES
        # README.md and bn_tf1/README.md list what is in the package itself, and in
        # `commands` each module is the command of its name.
        if path.name == "__init__.py" and path.parent.name not in ("bn_tf1", "commands")
    ],
    ids=dotted_name,
)
def test_a_room_says_what_it_holds(first_page):
    text = ast.get_docstring(ast.parse(first_page.read_text(encoding="utf-8")))
    inside = {path.stem for path in first_page.parent.glob("*.py")} - {"__init__"}
    inside |= {path.parent.name for path in first_page.parent.glob("*/__init__.py")}
    assert not {name for name in inside if not re.search(rf"\b{name}\b", text)}


def test_no_room_holds_more_than_a_third_of_the_house():
    lines = collections.Counter()
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0]
        lines[room] += path.read_text(encoding="utf-8").count("\n")
    (room, most), *_ = lines.most_common(1)
    assert most <= 0.35 * sum(lines.values()), room


def test_no_two_modules_have_one_name():
    names = collections.Counter(path.stem for path in MODULES)
    twins = {name for name, n in names.items() if n > 1 and not name.startswith("__")}
    assert not twins


def test_no_two_public_classes_have_one_name():
    names = collections.Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not {name for name, n in names.items() if n > 1}


def test_no_module_has_the_name_of_something_public():
    """`bn_tf1.batch_norm` must not be a function now and a module a moment later."""
    for folder in {path.parent for path in MODULES}:
        face = importlib.import_module(dotted_name(folder / "__init__.py"))
        public = {
            name
            for name in getattr(face, "__all__", ())
            if not isinstance(getattr(face, name), types.ModuleType)
        }
        modules = {path.stem for path in folder.glob("*.py")}
        modules |= {path.name for path in folder.iterdir() if path.is_dir()}
        assert not public & modules, folder


IMPORT_PROBE = """
import sys
import tensorflow.compat.v1 as tf


def state():
    return [
        tf.executing_eagerly(),
        tf.control_flow_v2_enabled(),
        tf.resource_variables_enabled(),
        tf.get_logger().level,
    ]


before = state()
import bn_tf1
scripts = {"train", "eval", "bn_tf1.jobs"} & set(sys.modules)
print("same" if state() == before and not scripts else (before, state(), scripts))
"""


def test_importing_changes_no_global_state():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE],
        check=False,
        cwd=str(ROOT),
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "same", result.stdout + result.stderr


# What `import bn_tf1` may not take time for: it is imported when it is asked for.
FACE_PROBE = """
import sys
import bn_tf1

RARE = ("checkpoints", "graphs", "doctor", "population", "jobs", "layers", "slim")
early = [name for name in RARE if "bn_tf1." + name in sys.modules]
lost = [name for name in bn_tf1.__all__ if name not in dir(bn_tf1)]
bn_tf1.layers.install, bn_tf1.slim.batch_norm, bn_tf1.keep_memory
try:
    bn_tf1.batchnorm
except AttributeError as error:
    print(early, lost, "tensorflow" in sys.modules, error)
"""


def test_the_face_imports_the_core_and_everything_else_when_asked_for():
    result = subprocess.run(
        [sys.executable, "-c", FACE_PROBE],
        check=False,
        cwd=str(ROOT),
        capture_output=True,
        text=True,
    )
    missing = "module 'bn_tf1' has no attribute 'batchnorm'"
    assert result.stdout == f"[] [] True {missing}\n", result.stderr


def test_editors_and_type_checkers_see_the_same_face():
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {name: f"{module}.{name}" for name, module in bn_tf1._MODULES.items()}
    table.update({room: f"bn_tf1.{room}" for room in bn_tf1._ROOMS})
    assert seen == table


def test_the_public_face():
    for name in bn_tf1.__all__:
        value = getattr(bn_tf1, name)
        assert getattr(value, "__name__", name).rpartition(".")[2] == name
    text = pydoc.render_doc(bn_tf1, renderer=pydoc.plaintext)
    assert "    batch_norm(x: 'tf.Tensor" in text
    assert "    make_train_op(loss: 'tf.Tensor', optimizer" in text
    assert "class LayerTensors(" in text
