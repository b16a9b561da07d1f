# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the site has beside docs/: README, CONTRIBUTING, recipes, notebooks, and a reference made from the package itself.

mkdocs calls the functions `on_…`. Links are written for GitHub, relative to the file they are in; here they become links to
pages of the site, or to files of the repository. A link to neither stays as it is, and mkdocs fails on it.
"""

import argparse
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fedlpp_hf


ROOT = Path(__file__).parents[2]
# Files of the repository that are pages, too, under these names.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "recipes/README.md": "recipes/README.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]*)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^ *from (fedlpp_hf\.[\w.]+) import ([\w, ]+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation what is made here, and pages that it does not list."""
    config.mdx_configs["toc"]["slugify"] = slugify
    listed = set(re.findall(r"[\w/.-]+\.md", json.dumps(config.nav)))
    pages = [path.name for path in sorted(Path(config.docs_dir).glob("*.md"))]
    pages += [f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    unlisted = [page for page in pages if page not in listed]
    config.nav += [{"More": unlisted}] if unlisted else []
    config.nav.append({"Reference": list(make_reference())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    made |= {
        f"notebooks/{path.stem}.md": render_notebook(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }
    for page, text in (made | make_reference()).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site, or at files of the repository."""
    here = page.file.src_uri
    sources = {f"notebooks/{path.stem}.md": f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    sources |= {made: source for source, made in PAGES.items()}
    pages = {sources.get(file.src_uri, f"docs/{file.src_uri}"): file.src_uri for file in files}

    def rewrite(match: re.Match) -> str:
        path, anchor = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(sources.get(here, f"docs/{here}")), path))
        if target in pages:
            return posixpath.relpath(pages[target], posixpath.dirname(here) or ".") + anchor
        if (ROOT / target).exists():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{config.repo_url}/{kind}/main/{target}{anchor}"
        return match[0]

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(rewrite, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewrite, markdown[end:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the default of `field(default_factory=lambda: [0.0])` as [0.0]."""
    return re.sub(r"\(lambda: ([^<]*)\)\(\)", r"\1", html)


def slugify(title: str, separator: str) -> str:
    """The anchor that GitHub gives a heading: links to `page.md#anchor` work there and here."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def render_notebook(path: Path) -> str:
    """A notebook as Markdown, with its outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/plain", ""))
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    kept = f"The notebook: [`notebooks/{path.name}`](https://github.com/fedlpp/fedlpp_hf/blob/main/notebooks/{path.name})."
    return "\n\n".join([parts[0], kept, *parts[1:]]) + "\n"


def make_reference() -> dict[str, str]:
    """The pages of the reference by their names: public names, options, commands, and what the docs import besides."""
    pages = {"reference/index.md": ""}
    rows = []
    for name in fedlpp_hf.__all__:
        rows.append(f"| [`{name}`]({name}.md) | {summarize(name)} |")
        pages[f"reference/{name}.md"] = (
            f"---\ntitle: {name}\n---\n\n::: fedlpp_hf.{name}\n    options: {{heading_level: 1}}\n"
        )
    pages["reference/FederatedConfig.md"] = (
        "---\ntitle: FederatedConfig\n---\n\n::: fedlpp_hf.FederatedConfig\n"
        "    options: {heading_level: 1, show_signature: false, separate_signature: false, members: false}\n\n"
        + "\n".join(
            f"::: {group}\n    options: {{parameter_headings: true, members: false, show_signature: false, separate_signature: false}}\n"
            for group in list_groups()
        )
    )
    pages["reference/commands.md"] = render_commands()
    pages["reference/others.md"] = (
        "# Other names\n\nFunctions that these pages import from folders of the package, and types that public names take or "
        "return.\n\n"
        + "\n".join(
            f"::: {name}\n    options: {{show_root_full_path: true}}\n" for name in list_imports() + list_types()
        )
    )
    pages["reference/index.md"] = (
        "---\ntitle: Reference\n---\n\n# Reference\n\n`from fedlpp_hf import …`:\n\n| name | what |\n|---|---|\n"
        + "\n".join(rows)
        + "\n\nAlso: [the options, with their defaults](FederatedConfig.md#fedlpp_hf.config.rounds.RoundOptions), "
        "[the commands](commands.md), [other names](others.md).\n"
    )
    return pages


def summarize(name: str) -> str:
    """The first sentence of a public name's docstring, without links."""
    text = " ".join((getattr(fedlpp_hf, name).__doc__ or "").split())
    first = re.split(r"(?<=[.;:]) (?=[A-Z`])", text)[0]
    return re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", first).replace("|", "\\|").removesuffix(":")


def list_groups() -> list[str]:
    """The dataclasses whose fields are the options."""
    from fedlpp_hf.config.federated import GROUPS

    return [f"{group.__module__}.{group.__qualname__}" for group in GROUPS]


def list_imports() -> list[str]:
    """What the pages import from folders of the package."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    texts += [(ROOT / source).read_text(encoding="utf-8") for source in ("README.md", "recipes/README.md")]
    found = [
        (module, name.strip()) for text in texts for module, names in IMPORT.findall(text) for name in names.split(",")
    ]
    return sorted({f"{module}.{name}" for module, name in found})


def list_types() -> list[str]:
    """The classes of the package that public functions and dataclasses take, have or return."""
    found: set[type] = set()

    def add(hint: Any) -> None:
        for part in get_args(hint):
            add(part)
        if isinstance(hint, type) and hint.__module__.startswith("fedlpp_hf.") and hint not in found:
            found.add(hint)
            if is_dataclass(hint):
                add_hints(hint)

    def add_hints(scope: Any) -> None:
        for hint in get_type_hints(scope).values():
            if get_origin(hint) is not ClassVar:
                add(hint)

    public = [getattr(fedlpp_hf, name) for name in fedlpp_hf.__all__]
    for scope in public:
        if is_dataclass(scope) or not isinstance(scope, type):
            add_hints(scope)
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in found.difference(public))


def render_commands() -> str:
    """Every command of `fedlpp-hf` with its arguments, from the parser."""
    from fedlpp_hf.cli.main import build_parser

    parser = build_parser()
    parts = ["# Commands\n\nWhat `fedlpp-hf COMMAND --help` says. [How to use them](../command-line.md)."]
    for name, command in parser.commands.items():
        parts.append(f"## fedlpp-hf {name}\n\n{escape(command.description or '', quote=False)}")
        usage = re.sub(r"\n +", "\n    ", command.format_usage().removeprefix("usage: ").strip())
        parts.append(f"```text\n{usage}\n```")
        parts.append("| argument | what |\n|---|---|\n" + "\n".join(list_arguments(command)))
        parts.append(f"```bash\n{trim(command.epilog or '')}\n```")
    return "\n\n".join(parts) + "\n"


def list_arguments(command: argparse.ArgumentParser) -> Iterator[str]:
    """A row for each argument of a command."""
    for action in command._actions:
        if action.dest == "help":
            continue
        value = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        )
        name = ", ".join(action.option_strings) or action.dest
        name += f" {value}" if action.option_strings and action.nargs != 0 else ""
        text = (action.help or "") % (vars(action) | {"prog": command.prog})
        required = " Required." if action.required and action.option_strings else ""
        yield f"| `{name}` | {escape(text, quote=False).replace('|', chr(92) + '|')}{required} |".replace(
            "{", "&#123;"
        )


def trim(epilog: str) -> str:
    """The examples of a command, without their heading and indentation."""
    return "\n".join(line.strip() for line in epilog.removeprefix("examples:\n").splitlines())
