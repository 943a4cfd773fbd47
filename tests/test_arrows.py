"""Who may import whom, and that training needs neither TensorFlow nor librosa."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOT = REPO / "speechjax"
HOST_ONLY = {"tensorflow", "tensorflow_datasets", "librosa"}
STDLIB = set(sys.stdlib_module_names)


def name_of(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    return {name_of(file, root): file for file in sorted(root.rglob("*.py"))}


def imports(file: Path, root: Path = ROOT, *, at_import_time: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports; with `at_import_time`, not those inside functions."""
    found = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_import_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name_of(file, root).split(".")
                package = package if file.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            # `from package import name` may name a module or something inside one.
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            found.update(deeper & modules(root).keys() or {base})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def closure(start: set[str], root: Path = ROOT) -> dict[str, set[str]]:
    """{module: what it imports at import time} for everything that importing `start` loads, packages included."""
    known, found, queue = modules(root), {}, sorted(start)
    while queue:
        name = queue.pop()
        if name in found or name not in known:
            continue
        found[name] = imports(known[name], root, at_import_time=True)
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
        queue += sorted(found[name] | parents)
    return found


def top(name: str) -> str:
    return name.split(".")[0]


def room(name: str) -> str:
    """The part of a name after the package: `models` for speechjax.models.encoder, `train` for speechjax.train."""
    return name.split(".")[1] if "." in name else ""


def in_rooms(*rooms: str) -> list[str]:
    return [name for name in modules() if room(name) in rooms]


def outside(name: str, allowed: set[str]) -> set[str]:
    """What a module imports that is neither allowed nor of the standard library; `errors` is everyone's."""
    found = imports(modules()[name])
    own = {f"speechjax.{room(n)}" for n in found if top(n) == "speechjax"}
    return (own | {top(n) for n in found if top(n) != "speechjax"}) - allowed - {"speechjax.errors"} - STDLIB


# ---- static


@pytest.mark.parametrize("name", in_rooms("models", "tasks", "audio", "train", "step"))
def test_training_code_names_no_host_library_anywhere(name):
    """Not even inside a function: it must run where they are not installed."""
    assert not {top(n) for n in imports(modules()[name])} & HOST_ONLY


def test_nothing_that_training_imports_loads_a_host_library():
    start = {*in_rooms("models", "tasks", "audio", "evals"), "speechjax.train"}
    for name, found in closure(start).items():
        assert not {top(n) for n in found} & HOST_ONLY, name


@pytest.mark.parametrize("name", in_rooms("audio"))
def test_audio_knows_jax_and_numpy_only(name):
    assert not outside(name, {"jax", "numpy", "speechjax.audio"})


@pytest.mark.parametrize("name", in_rooms("models"))
def test_models_know_audio_and_models_only(name):
    assert not outside(name, {"jax", "numpy", "flax", "speechjax.audio", "speechjax.models"})


@pytest.mark.parametrize("name", in_rooms("tasks"))
def test_tasks_know_models_and_audio_only(name):
    allowed = {"speechjax.audio", "speechjax.models", "speechjax.tasks"}
    if name == "speechjax.tasks.distill":  # its teacher is another run
        allowed |= {"speechjax.runs"}
    assert not outside(name, {"jax", "numpy", "flax", "optax", *allowed})


@pytest.mark.parametrize("name", in_rooms("data"))
def test_data_knows_nothing_of_models_tasks_or_training(name):
    rooms = {room(n) for n in imports(modules()[name]) if top(n) == "speechjax"}
    assert rooms <= {"data", "errors", "machine"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_imports_main(name):
    assert "speechjax.main" not in imports(modules()[name])


@pytest.mark.parametrize("name", sorted(modules()))
def test_tensorflow_lives_in_data_alone(name):
    found = {top(n) for n in imports(modules()[name])} & {"tensorflow", "tensorflow_datasets"}
    # Its own formats are written and tried by TensorFlow itself.
    theirs = {"speechjax.formats.saved_model", "speechjax.formats.litert"}
    assert not found or room(name) == "data" or name in theirs
    # Late even there: reading a folder of recordings needs none of it.
    assert not {top(n) for n in imports(modules()[name], at_import_time=True)} & HOST_ONLY


def test_the_low_rooms_do_not_know_the_loop():
    allowed = {"paths", "errors", "sharding", "ewc", "distributed"}
    for name in in_rooms("paths", "errors", "sharding", "optim", "checkpoint", "display"):
        assert {room(n) for n in imports(modules()[name]) if top(n) == "speechjax"} <= allowed


# ---- for real


def blocked_import(names: list[str], cwd: Path, block: set[str] = HOST_ONLY) -> subprocess.CompletedProcess:
    """Imports `names` in a fresh process in which the libraries of `block` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(block)!r}))\n"
    code += "".join(f"import {name}\n" for name in names) + f"print('imported {len(names)}')"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_training_imports_where_the_host_libraries_are_missing():
    names = ["speechjax.train", *in_rooms("models", "tasks", "audio", "evals")]
    done = blocked_import(names, REPO)
    assert done.stdout.strip() == f"imported {len(names)}", done.stderr[-2000:]


# ---- the checker itself


@pytest.fixture
def house(tmp_path):
    """A small package that breaks the rules in every way the checker must see."""
    files = {
        "__init__.py": "",
        "plain.py": "import json\nfrom pkg.sub import helper\n",
        "late.py": "def f():\n    import tensorflow as tf\n    return tf\n",
        "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import librosa\n",
        "guarded.py": "try:\n    from librosa.feature import mfcc\nexcept ImportError:\n    pass\n",
        "dynamic.py": "import importlib\ntf = importlib.import_module('tensorflow')\n",
        "inclass.py": "class A:\n    import tensorflow\n",
        "sub/__init__.py": "from . import helper\n",
        "sub/helper.py": "from ..deep import thing\n",
        "deep.py": "import tensorflow.data\nthing = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path / "pkg"


@pytest.mark.parametrize(
    ("name", "anywhere", "at_import"),
    [
        ("pkg.plain", set(), set()),
        ("pkg.late", {"tensorflow"}, set()),
        ("pkg.typed", {"librosa"}, set()),
        ("pkg.guarded", {"librosa"}, {"librosa"}),
        ("pkg.dynamic", {"tensorflow"}, {"tensorflow"}),
        ("pkg.inclass", {"tensorflow"}, {"tensorflow"}),
        ("pkg.deep", {"tensorflow"}, {"tensorflow"}),
    ],
)
def test_the_checker_sees_what_is_there(house, name, anywhere, at_import):
    file = modules(house)[name]
    assert {top(n) for n in imports(file, house)} & HOST_ONLY == anywhere
    assert {top(n) for n in imports(file, house, at_import_time=True)} & HOST_ONLY == at_import


def test_the_checker_follows_imports_through_packages_and_relative_names(house):
    found = closure({"pkg.plain"}, house)
    assert set(found) == {"pkg", "pkg.plain", "pkg.sub", "pkg.sub.helper", "pkg.deep"}
    assert "tensorflow.data" in found["pkg.deep"]
    assert "pkg.late" not in closure({"pkg.typed"}, house)


def test_the_blocked_process_does_fail(house):
    """`json` stands for a library that is installed: once blocked it cannot be imported, else it can."""
    good = blocked_import(["pkg.typed"], house.parent)
    assert good.returncode == 0, good.stderr
    bad = blocked_import(["pkg.deep"], house.parent)
    assert bad.returncode != 0
    assert "ModuleNotFoundError" in bad.stderr
    assert "tensorflow" in bad.stderr
    late = blocked_import(["pkg.plain"], house.parent, block={"json"})
    assert "import of json halted" in late.stderr
