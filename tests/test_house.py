# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The architecture, checked: which module may know which, what importing costs, and what no module may do."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "fedlpp_hf"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
# A module imports from its own floor and those below. A new module must be given its floor here; a package's modules
# are on its floor unless they are named.
FLOORS = {
    # Pure tensor functions, and values.
    "adapters": 0,
    "arguments": 0,
    "config": 0,
    "partition": 0,
    "ranks": 0,
    "schedules": 0,
    "walks": 0,
    "quantization": 0,
    "rounding": 0,
    "rules": 0,
    "tensor_files": 0,
    # What is made of them: messages, rules of aggregation, files.
    "aggregation": 1,
    "base": 1,
    "base_transfer": 1,
    "checkpoints": 1,
    "compression": 1,
    "corrections": 1,
    "hub": 1,
    "merge": 1,
    "model_card": 1,
    "messages": 1,
    "shards": 1,
    "store": 1,
    # Processes: the client's guard, the owner, the server.
    "admission": 2,
    "blueprint": 2,
    "callbacks": 2,
    "owner": 2,
    "privacy": 2,
    "processes": 2,
    "report": 2,
    "server": 2,
    "workers": 2,
    # HF's classes.
    "publishing": 3,
    "trainer": 3,
    # Ways to run it all.
    "cli": 4,
    "client": 4,
    "deployment": 4,
    "flower": 4,
    "inspection": 4,
    "local_socket": 4,
    "remote": 4,
}
MAX_LINES = 400
PICKLES = {"torch", "pickle", "cloudpickle", "dill", "joblib", "shelve"}


def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def find_floor(name: str) -> int | None:
    parts = name.split(".")
    return next((FLOORS[key] for end in range(len(parts), 0, -1) if (key := ".".join(parts[:end])) in FLOORS), None)


def walk_code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, in functions too, but not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk_code(child)


def find_imports(name: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports, by their names in it, and the packages that are not ours."""
    ours: set[str] = set()
    others: set[str] = set()
    is_package = MODULES[name].name == "__init__.py"
    here = ["fedlpp_hf", *name.split(".")][: None if is_package else -1]
    for node in walk_code(parse(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            # `from . import x` names a module, `from .x import y` names a thing in one.
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            root, _, rest = target.partition(".")
            if root != "fedlpp_hf":
                others.add(root)
                continue
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            if rest:
                ours.add(rest)
    return ours - {name}, others


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_module_has_a_floor():
    assert [name for name in MODULES if find_floor(name) is None] == [], "give each new module its line in FLOORS"


@pytest.mark.parametrize("name", MODULES)
def test_module_knows_nothing_of_higher_floors(name):
    ours, _ = find_imports(name)
    assert [other for other in ours if find_floor(other) > find_floor(name)] == []


def test_imports_are_found_where_they_are():
    """The scanner sees what it should, or the tests above would pass on anything."""
    ours, others = find_imports("trainer")
    assert {"adapters", "base", "server", "owner"} <= ours and {"torch", "transformers", "peft"} <= others
    assert "owner" not in find_imports("server")[0]  # for type checkers only
    assert "bitsandbytes" in find_imports("callbacks")[1]  # inside a function


def test_no_two_modules_import_each_other():
    graph = {name: find_imports(name)[0] for name in MODULES}

    def reach(name: str, seen: set[str]) -> set[str]:
        for other in graph[name] - seen:
            seen |= {other}
            reach(other, seen)
        return seen

    # Within a package (merge, privacy) the order is its own affair.
    assert [name for name in graph if "." not in name and name in reach(name, set())] == []


def test_nothing_imports_the_command_line_or_flower():
    for name in MODULES:
        ours, others = find_imports(name)
        for end in ("cli", "flower"):
            assert is_within(name, end) or not any(is_within(other, end) for other in ours), (name, end)
        # The message apps of Flower live beside its transport.
        assert "flwr" not in others or find_floor(name) == 4, name


def test_server_has_no_way_to_a_model():
    ours, others = find_imports("server")
    forbidden = {"base", "callbacks", "checkpoints", "merge", "owner", "trainer"}
    assert not {name.split(".")[0] for name in ours} & forbidden
    assert not others & {"transformers", "accelerate", "bitsandbytes", "datasets"}


def test_pure_functions_stay_pure():
    pure = ("quantization", "aggregation", "partition", "compression", "corrections")
    for name in (name for name in MODULES if any(is_within(name, package) for package in pure)):
        assert not find_imports(name)[1] & {"transformers", "accelerate", "datasets", "pathlib", "json"}, name


# Everything that is heavy or optional must wait until it is used. One interpreter, lightest import first.
_PROBE = """
import json, sys
for name in ("fedlpp_hf", "fedlpp_hf.cli", "fedlpp_hf.server", "fedlpp_hf.trainer"):
    __import__(name)
    print("loaded", json.dumps([name, sorted({m for m in sys.modules if m.startswith("fedlpp_hf.")}
                      | {m.partition(".")[0] for m in sys.modules})]))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What is in `sys.modules` of a fresh interpreter after each import."""
    run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=250)
    lines = [line.removeprefix("loaded ") for line in run.stdout.splitlines() if line.startswith("loaded ")]
    return {name: set(modules) for name, modules in map(json.loads, lines)}


@pytest.mark.parametrize("name", ["fedlpp_hf", "fedlpp_hf.cli"])
def test_package_and_command_import_nothing_heavy(loaded, name):
    heavy = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "flwr", "trl", "matplotlib", "evaluate"}
    assert not loaded[name] & heavy


def test_trainer_imports_no_extras(loaded):
    assert not loaded["fedlpp_hf.trainer"] & {"flwr", "trl", "matplotlib", "evaluate", "sklearn"}


def test_server_loads_nothing_that_opens_a_model(loaded):
    ways = {"fedlpp_hf.base", "fedlpp_hf.merge", "fedlpp_hf.owner", "fedlpp_hf.trainer", "fedlpp_hf.checkpoints"}
    assert not loaded["fedlpp_hf.server"] & ways


@pytest.mark.parametrize("name", MODULES)
def test_module_unpickles_nothing(name):
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PICKLES:
            assert node.attr not in ("load", "loads", "Unpickler", "open"), f"{name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            assert not {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}, f"{name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}:{node.value.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is_for(name):
    source = MODULES[name].read_text(encoding="utf-8")
    assert source.startswith("# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.\n")
    tree = ast.parse(source)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree)
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_modules_can_be_read_in_one_sitting():
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}
