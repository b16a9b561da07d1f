# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The site builds without a warning, has everything public in its reference, and asks no other host for anything."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import fedlpp_hf
from fedlpp_hf.cli.main import build_parser
from fedlpp_hf.config.federated import GROUPS
from tests.helpers import ROOT


pytest.importorskip("mkdocs")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+[^>]*>")


def build(config, site_dir):
    """What mkdocs prints, and whether it succeeded."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(config),
        "--site-dir",
        str(site_dir),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    code, output = build(ROOT / "mkdocs.yml", directory)
    assert code == 0 and "WARNING" not in output, output
    return directory


def test_reference_has_every_public_name_and_option(site):
    anchors = {
        page.stem: set(re.findall(r"id=[\"']?([^\"'> ]+)", page.read_text(encoding="utf-8")))
        for page in (site / "reference").glob("*.html")
    }
    for name in fedlpp_hf.__all__:
        assert f"fedlpp_hf.{name}" in anchors[name]
    for group in GROUPS:
        for field in fields(group):
            assert f"{group.__module__}.{group.__qualname__}({field.name})" in anchors["FederatedConfig"]


def test_reference_has_every_command_and_argument(site):
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name, command in build_parser().commands.items():
        section = page.split(f'id="fedlpp-hf-{name}"')[1].split("<h2")[0]
        for action in command._actions:
            for option in action.option_strings or [action.dest]:
                assert action.dest == "help" or option in section, (name, option)


def test_every_page_of_the_docs_is_found_by_the_search(site):
    places = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]
    }
    pages = [path.stem for path in (ROOT / "docs").glob("*.md")] + ["index", "CONTRIBUTING", "recipes/index"]
    pages += [f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    for page in pages:
        assert {f"{page}.html", "" if page == "index" else f"{page}.html"} & places, page


def test_nothing_is_loaded_from_another_host(site):
    for page in site.rglob("*.html"):
        found = LOADED.findall(page.read_text(encoding="utf-8"))
        assert [tag for tag in found if 'rel="canonical"' not in tag] == [], page
        assert 'data-md-component="source"' not in page.read_text(encoding="utf-8")  # asks api.github.com
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("link", ["merge.md#no-such-heading", "../recipes/no_such_file.py", "no-such-page.md"])
def test_a_broken_link_fails_the_build(tmp_path, link):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "merge.md").write_text("# Merge\n")
    (docs / "extra.md").write_text(f"# Extra\n\nSee [this]({link}).\n")
    config = tmp_path / "mkdocs.yml"
    hook = ROOT / "docs" / "site" / "hooks.py"
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = text[text.index("validation:") : text.index("\n\n", text.index("validation:"))]
    config.write_text(
        f"site_name: t\nstrict: true\nrepo_url: https://example.org\nhooks: [{tmp_path}/hook.py]\n{validation}\n"
    )
    (tmp_path / "hook.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('hooks', {str(hook)!r})\n"
        "hooks = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(hooks)\n"
        "on_page_markdown = hooks.on_page_markdown\n"
    )
    code, output = build(config, tmp_path / "out")
    assert code != 0 and link.partition("#")[0].removeprefix("../") in output, output
