"""Output to the terminal: text is printed literally, never as markup, and a failure to print never ends the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

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


class Stream:
    """A standard stream that takes every text: a reader that is gone or a disk that is full must not end a run.

    Attributes:
        lost: why text was lost; None where none was.
        kept: what the command has left on disk, for who cannot read its output.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.lost: Exception | None = None
        self.kept: Path | None = None
        self._null: TextIO | None = None
        if stream is None:  # closed before we began; this takes its number, which else the next file would have
            stream = self._null = open(os.devnull, "w")  # noqa: SIM115 - closed in `close`
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # what the encoding lacks is told by its number
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or remember why that failed."""
        if self._null is not None:
            self.lost = OSError(errno.EBADF, "it is closed")
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """The same."""
        self._try(self._stream.flush)

    def close(self) -> None:
        """Flush; the stream itself stays open."""
        self.flush()
        if self._null is not None:
            self._null.close()

    def _try(self, action: Callable[..., object], *given: str) -> None:
        if self.lost is not None:
            return
        try:
            action(*given)
        except (OSError, ValueError) as error:  # ValueError: closed since
            self.lost = error
            with suppress(OSError, ValueError):  # the interpreter would try again as it ends
                number = self._stream.fileno()
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Both standard streams replaced; that of the output."""
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.close()
        err.close()
        sys.stdout, sys.stderr = before


def keep(path: Path) -> None:
    """Say where the result is, should standard output not take it."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.kept = path
