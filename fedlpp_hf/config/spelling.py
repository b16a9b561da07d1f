# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Names of options in messages: the nearest to a mistyped one, and `--num_rounds 3` for `num_rounds=3`.

It needs nothing but the standard library, so that a typing error is reported at once.
"""

import difflib
import re
from collections.abc import Collection, Iterable


_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s,;:)`]*[^\s,;:.)`]"""


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: which one may be meant, if any is near.

    Args:
        name: what was typed.
        known: names that exist.
        prefix: to write before the name.
    """
    match = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean `{prefix}{match[0]}`?" if match else "."


def name_options(message: str, options: Collection[str], switches: Collection[str] = ()) -> str:
    """Rewrite a message about Python arguments as one about options of the command line.

    Args:
        message: `num_rounds=3`, `` `num_rounds` `` and `num_rounds` become `--num_rounds 3` and `--num_rounds`.
        options: their names. A name without an underscore is a common word, too, and changes only with a value or in
            backticks.
        switches: those of them that take no value.
    """

    def write(match: re.Match) -> str:
        name, value = match[1], match[2]
        if name not in options:
            return match[0]
        if value == "None" or (name in switches and value == "False"):
            return f"no --{name}"
        return f"--{name}" if name in switches else f"--{name} {value.strip(chr(39) + chr(34))}"

    message = re.sub(rf"(?<![\w./-])([a-z][a-z0-9_]*)=({_VALUE})", write, message)
    for name in options:
        message = message.replace(f"`{name}`", f"--{name}")
        if "_" in name:
            message = re.sub(rf"(?<![\w./`'-]){re.escape(name)}(?![\w/='`(]|\.\w)", f"--{name}", message)
    return re.sub(r"(`?)(--\w+)((?: True)?\1) \(\2\)", r"\1\2\3", message)
