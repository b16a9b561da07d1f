# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Links between docstrings: ``[`train`]`` becomes a link if the reference has the name, and plain code otherwise."""

import re

from griffe import Extension, Module, NameResolutionError, Object


class LinkNames(Extension):
    """Griffe's extension, which mkdocs.yml names."""

    def on_package(self, *, pkg: Module, **kwargs) -> None:
        """Rewrite the docstrings of a package."""
        link_docstrings_(pkg)


def link_docstrings_(scope: Object) -> None:
    """Rewrite the docstrings of an object and of all it defines."""
    if scope.docstring:
        scope.docstring.value = re.sub(
            r"\[`(~?)([A-Za-z_][\w.]*)`\]", lambda match: link(scope, match[1], match[2]), scope.docstring.value
        )
    for member in scope.members.values():
        if not member.is_alias:
            link_docstrings_(member)


def link(scope: Object, tilde: str, name: str) -> str:
    """A link to what `name` means in `scope`, which may be missing from the reference."""
    shown = name.rpartition(".")[2] if tilde else name
    try:
        target = name if tilde else scope.resolve(name)
    except NameResolutionError:
        return f"`{shown}`"
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
