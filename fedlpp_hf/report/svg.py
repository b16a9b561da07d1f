# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A figure as SVG inside a page: text stays text, colours are the page's, and equal figures are equal files."""

import io
import re
from html import escape
from typing import TYPE_CHECKING

from .parties import COLORS, GAIN, INK, MUTED, PAGE


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The page turns these round where the reader prefers dark pages.
_VARIABLES = {
    "#000000": "var(--ink)",
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    "#555555": "var(--muted)",
    "#b0b0b0": "var(--muted)",
    GAIN: "var(--gain)",
    PAGE: "var(--page)",
    COLORS["owner"]: "var(--owner)",
    COLORS["clients"]: "var(--clients)",
}


def draw_svg(figure: "Figure", label: str, prefix: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: Drawn with the colours of [`draw_parties`].
        label: What it shows, for readers who can't see it.
        prefix: Of ids: no two figures of a page may have the same.
    """
    import matplotlib

    buffer = io.StringIO()
    # What is drawn depends neither on the day nor on a random salt.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedlpp_hf"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    opening = f'<svg {size.group() if size else ""} role="img" aria-label="{escape(label)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r"\n\s*\n+", "\n", text).strip()
