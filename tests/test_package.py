# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The wheel and the sdist, and what pages say about installing them."""

import configparser
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from fedlpp_hf import __version__
from tests.helpers import ROOT


# Without this name in front of it: a source (`@ git+…`, a wheel's path) or a clone (`.[demo]`, `--editable .`).
UNSOURCED = re.compile(r"pip3? install[^\n`]*?(?<![\w/.-])['\"]?fedlpp[_-]hf(?:\[[\w,]+\])?(?! @|[\w\[/@-]|\.\w)")
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*", "deploy/*", "fedlpp_hf/**/*.py", "benchmarks/**/*.py", "*.cff")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.suffix not in (".pyc", ".png")
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "unsourced"),
    [
        ("pip install fedlpp_hf", True),
        ("pip install 'fedlpp_hf[demo]'", True),
        ('pip install -U "fedlpp-hf[flower]"', True),
        ("python -m pip install -c constraints.txt fedlpp_hf[trl].", True),
        ('pip install "fedlpp_hf[demo] @ git+https://github.com/fedlpp/fedlpp_hf"', False),
        ("pip install -c constraints.txt '.[demo]'", False),
        ("pip install dist/fedlpp_hf-0.1.0-py3-none-any.whl", False),
        ("pip install gguf && python fedlpp_hf/cli/main.py", False),
    ],
)
def test_unsourced_installations_are_recognized(text, unsourced):
    assert bool(UNSOURCED.search(text)) == unsourced


def test_no_page_installs_from_an_index_that_does_not_have_it():
    """The name is not registered: whoever registers it would be installed."""
    assert len(PAGES) > 100
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}" for path in PAGES for match in UNSOURCED.finditer(path.read_text())
    }
    app = (ROOT / "recipes" / "flower" / "pyproject.toml").read_text()
    assert re.findall(r"^dependencies = (.*?)  #", app, flags=re.MULTILINE) == ["[]"]
    # The changelog of a release ends this.
    assert "There is no release yet" in (ROOT / "CHANGELOG.md").read_text() and not found, found


def test_citation_and_changelog_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{__version__}]" in changelog or ("dev" in __version__ and "## [Unreleased]" in changelog)


def test_workflow_publishes_what_was_tested_and_holds_no_token():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    publish = jobs["publish"]
    assert set(publish["needs"]) == {"build", "test"}
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"]["name"] == "pypi"
    uses = [step.get("uses", "").partition("@")[0] for step in publish["steps"]]
    assert uses == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]  # nothing is built again
    assert all("id-token" not in jobs[job].get("permissions", {}) for job in ("build", "test"))
    assert "secrets." not in text and "password" not in text


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist of the tracked files."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is older than pyproject.toml asks for")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git, or no checkout: which files are tracked is unknown")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for build in ("build_wheel", "build_sdist"):
        code = f"from setuptools.build_meta import {build}; {build}({str(output)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=200)
    return next(output.glob("*.whl")), next(output.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        info = f"fedlpp_hf-{__version__}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        commands = configparser.ConfigParser()
        commands.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedlpp_hf").rglob("*.py")}
    assert {name for name in names if not name.startswith(info)} == package | {
        "fedlpp_hf/py.typed",
        "fedlpp_hf/report/page.html",
    }
    assert f"{info}/licenses/LICENSE" in names
    assert commands["console_scripts"]["fedlpp-hf"] == "fedlpp_hf.cli.main:main"
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(metadata.get_all("Classifier"))
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Paper"} == set(links)
    assert {"demo", "docs", "lm", "sentences", "speech", "trackers", "trl", "flower", "privacy", "test", "dev"} == set(
        metadata.get_all("Provides-Extra")
    )


@pytest.mark.slow
def test_sdist_has_what_a_packager_needs(distributions):
    root = f"fedlpp_hf-{__version__}"
    with tarfile.open(distributions[1]) as sdist:
        names = {name.removeprefix(f"{root}/") for name in sdist.getnames()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "Makefile", "pyproject.toml"}
    needed |= {"tests/helpers.py", "tests/trainer/cases.py", "recipes/causal_lm.py", "recipes/configs/quickstart.yaml"}
    needed |= {"docs/threat-model.md", "deploy/compose.yaml", "deploy/Dockerfile.dockerignore", "fedlpp_hf/py.typed"}
    assert needed <= names, needed - names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git", "out/"))]
