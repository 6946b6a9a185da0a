"""The one place where text meets the terminal: what users and plugins named is printed as it is, never as markup."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console that takes text literally, in tables too: `[/b]` and `:smile:` are printed as they stand.

    Emphasis is a `Text`, see `marked`.
    """
    return Console(stderr=stderr, markup=False, emoji=False)


def marked(word: str, colour: str, rest: str) -> Text:
    """A line that begins with a coloured word."""
    return Text.assemble((word, colour), " ", rest)
