# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The architecture, checked: which folder may know which, what importing costs, and what no module may do."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedlpp_hf
from tests.helpers import ROOT


PACKAGE = ROOT / "fedlpp_hf"
# A folder imports from those before it. A new file needs no entry anywhere.
ORDER = (
    "tensors", "config", "wire", "aggregation", "privacy", "base", "merge", "client", "server", "report", "hub", "processes",
    "audit", "trainer", "flower", "cli",
)  # fmt: skip
# What a folder must not reach, however many modules are in between: this is privacy.
PROHIBITED = {
    "server": ("base", "merge", "client", "processes"),
    "client": ("merge", "processes", "base.full_model"),
}
# Functions of tensors alone: no files, no datasets, no trainers.
PURE = ("aggregation", "privacy", "client.partition", "tensors.quantization", "wire.compression")
MAX_LINES = 300
MAX_PARAMETERS = 8
# Functions that users call by name may have more, as the public names of the package may.
ENTRY_POINTS = {*fedlpp_hf.__all__, "push_adapter", "push_merged", "run_server", "run_client"}
PICKLES = {"torch", "pickle", "cloudpickle", "dill", "joblib", "shelve"}
LICENCE = "# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.\n"


def list_modules(root: Path) -> dict[str, Path]:
    """Files by their dotted names below `root`; a folder's `__init__` has the folder's name."""
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in names.items()}


MODULES = list_modules(PACKAGE)
FILES = {name: path for name, path in MODULES.items() if path.name != "__init__.py"}
TESTS = list_modules(ROOT / "tests")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find_targets(path: Path, root: Path) -> Iterator[tuple[str, ast.ImportFrom | None]]:
    """All that a file imports, by its dotted name: in functions and for type checkers, too."""
    here = (root.name, *path.relative_to(root).parts[:-1])
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join([*package, *([node.module] if node.module else [])])
            # `from . import x` may name a module, `from .x import y` names a thing in one.
            yield from ((f"{source}.{alias.name}", node) for alias in node.names)


@cache
def find_imports(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules of the package that a module imports, and the packages that are not ours."""
    ours: set[str] = set()
    others: set[str] = set()
    for target, _ in find_targets(MODULES[name], PACKAGE):
        root, _, rest = target.partition(".")
        if root != "fedlpp_hf":
            others.add(root)
            continue
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        if rest:
            ours.add(rest)
    return frozenset(ours - {name}), frozenset(others)


def reach(name: str) -> set[str]:
    """All modules of the package that are imported by importing this one and using all of it."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        found = find_imports(waiting.pop())[0] - seen
        seen |= found
        waiting += found
    return seen


def folder_of(name: str) -> str:
    return name.partition(".")[0]


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def list_functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a module; a method's name begins with its class's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from list_functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, node
            yield from list_functions(node)
        else:
            yield from list_functions(node, owner)


def test_folders_are_those_of_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ORDER)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_modules_import_from_folders_to_their_left():
    place = {name: ORDER.index(folder_of(name)) for name in MODULES if name}
    wrong = {name: [other for other in find_imports(name)[0] if place[other] > place[name]] for name in place}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_imports_are_found_where_they_are():
    """The scanner sees what it should, or the tests of this file would pass on anything."""
    ours, others = find_imports("trainer.federated")
    assert {"server.loop", "processes.owner", "trainer.local_run"} <= ours
    assert {"torch", "transformers", "peft"} <= others
    assert "bitsandbytes" in find_imports("client.checks")[1]  # inside a function
    assert "merge.report" in find_imports("report.inspection")[0]  # for type checkers only
    assert "aggregation.mean" in reach("server.loop")  # through aggregation.rules


def test_no_two_modules_import_each_other():
    assert [name for name in MODULES if name in reach(name)] == []


@pytest.mark.parametrize("folder", PROHIBITED)
def test_folder_does_not_reach_what_is_prohibited(folder):
    for part in PROHIBITED[folder]:
        assert any(is_within(name, part) for name in MODULES), f"`{part}` is in the table, but there is no such module"
    for name in (name for name in FILES if is_within(name, folder)):
        assert [other for other in reach(name) for part in PROHIBITED[folder] if is_within(other, part)] == [], name


def test_server_imports_nothing_that_makes_a_model():
    for name in (name for name in FILES if is_within(name, "server")):
        assert not find_imports(name)[1] & {"transformers", "accelerate", "bitsandbytes", "datasets"}, name


def test_flower_is_needed_in_its_folder_alone():
    assert {folder_of(name) for name in FILES if "flwr" in find_imports(name)[1]} == {"flower"}


@pytest.mark.parametrize("part", PURE)
def test_pure_functions_stay_pure(part):
    names = [name for name in FILES if is_within(name, part)]
    assert names
    for name in names:
        assert not find_imports(name)[1] & {"transformers", "accelerate", "datasets", "pathlib", "json", "os"}, name


def find_private_uses(name: str) -> Iterator[str]:
    """Private names of other folders that a module imports, takes from a module, or calls on a trainer."""
    modules: set[str] = set()  # names in this module that stand for modules of other folders
    for target, node in find_targets(FILES[name], PACKAGE):
        root, _, rest = target.partition(".")
        if root == "fedlpp_hf" and node is not None and folder_of(rest) != folder_of(name):
            for alias in node.names:
                if is_private(alias.name):
                    yield f"{node.lineno}: {alias.name}"
                if rest in MODULES and rest.endswith(f".{alias.name}"):
                    modules.add(alias.asname or alias.name)
    for node in ast.walk(parse(FILES[name])):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if holder in modules or (holder == "trainer" and folder_of(name) != "trainer"):
                yield f"{node.lineno}: {holder}.{node.attr}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_folder():
    assert {name: found for name in FILES if (found := sorted(set(find_private_uses(name))))} == {}


def count_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [entry.arg for entry in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_functions_have_few_parameters():
    """Bundle what belongs together into a small frozen dataclass."""
    wide = {
        f"{name}.{label}": count
        for name in FILES
        if folder_of(name) != "config"
        for label, node in list_functions(parse(FILES[name]))
        if (count := count_parameters(node)) > MAX_PARAMETERS and label.removesuffix(".__init__") not in ENTRY_POINTS
    }
    assert wide == {}


def test_files_can_be_read_in_one_sitting():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_names_tell_the_room():
    assert [name for name in FILES if {"utils", "util", "manager", "managers"} & set(name.split("."))] == []


@pytest.mark.parametrize("folder", ORDER)
def test_folder_is_a_sentence(folder):
    """Its `__init__` says what is in it, and does nothing."""
    docstring, *rest = parse(MODULES[folder]).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    for node in rest:
        if isinstance(node, ast.Assign):
            assert [ast.unparse(target) for target in node.targets] == ["__all__"]
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom), f"line {node.lineno}"


def test_modules_say_what_they_are_for():
    silent = []
    for name, path in MODULES.items():
        tree = parse(path)
        assert path.read_text(encoding="utf-8").startswith(LICENCE), name
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        silent += [f"{name}.{getattr(node, 'name', '')}" for node in (tree, *public) if not ast.get_docstring(node)]
    assert silent == []


def find_unpickling(name: str) -> Iterator[int]:
    """Lines of a module that could unpickle."""
    for node in ast.walk(parse(FILES[name])):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PICKLES:
            if node.attr in ("load", "loads", "Unpickler", "open"):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            if {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}:
                yield node.lineno
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno


def test_nothing_is_unpickled_but_what_a_parent_gives_its_own_child():
    assert [name for name in FILES if list(find_unpickling(name))] == ["processes.child"]


# Everything that is heavy or optional must wait until it is used. One interpreter, lightest import first.
_PROBE = """
import json, sys
for name in ("fedlpp_hf", "fedlpp_hf.cli.main", "fedlpp_hf.server.loop", "fedlpp_hf.trainer.federated"):
    __import__(name)
    print("loaded", json.dumps([name + ", whole", sorted(m for m in sys.modules if m.startswith("fedlpp_hf."))]))
    print("loaded", json.dumps([name, sorted({".".join(m.split(".")[:2]) for m in sys.modules if m.startswith("fedlpp_hf.")}
                      | {m.partition(".")[0] for m in sys.modules})]))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What is in `sys.modules` of a fresh interpreter after each import: packages, and folders of ours."""
    run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=250)
    lines = [line.removeprefix("loaded ") for line in run.stdout.splitlines() if line.startswith("loaded ")]
    return {name: set(modules) for name, modules in map(json.loads, lines)}


@pytest.mark.parametrize("name", ["fedlpp_hf", "fedlpp_hf.cli.main"])
def test_package_and_command_import_nothing_heavy(loaded, name):
    heavy = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "flwr", "trl", "matplotlib", "evaluate"}
    assert not loaded[name] & heavy


def test_trainer_imports_no_extras(loaded):
    assert not loaded["fedlpp_hf.trainer.federated"] & {"flwr", "trl", "matplotlib", "evaluate"}
    assert [name for name in FILES if "sklearn" in find_imports(name)[1]] == []  # transformers 5.20 loads it by itself


def test_trainer_loads_what_its_run_needs(loaded):
    """Neither the owner's process nor an audit is in each trainer's import."""
    modules = loaded["fedlpp_hf.trainer.federated, whole"]
    assert "fedlpp_hf.processes.owner" in modules
    assert not modules & {"fedlpp_hf.processes.owner_handler", "fedlpp_hf.merge.merge", "fedlpp_hf.audit.audit"}


def test_server_loads_nothing_that_opens_a_model(loaded):
    ways = {f"fedlpp_hf.{folder}" for folder in ("base", "merge", "client", "processes", "audit", "trainer")}
    assert "fedlpp_hf.aggregation" in loaded["fedlpp_hf.server.loop"]
    assert not loaded["fedlpp_hf.server.loop"] & ways


def test_no_test_imports_another():
    """Builders that tests share are in tests/helpers.py, or in a module of their folder that is no test."""
    wrong = []
    for name, path in TESTS.items():
        for target, _ in find_targets(path, ROOT / "tests"):
            root, *parts = target.split(".")
            if root == "tests" and any(part == "conftest" or part.startswith("test_") for part in parts):
                wrong.append(f"{name} imports {target}")
    assert wrong == []
