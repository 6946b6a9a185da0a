"""What tables over seeds share: a job in a process of its own unless it is on disk, and the spread of its figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def job(path: Path, what: str, *arguments: str) -> dict[str, Any]:
    """The JSON in `path`; if it is not there, what this script prints when called with `arguments` besides its own."""
    if not path.exists():
        print(f"{what} …", file=sys.stderr, flush=True)
        command = [sys.executable, sys.argv[0], *sys.argv[1:], *arguments]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        partial = path.with_suffix(".partial")
        partial.write_text(result.stdout)
        partial.replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """The mean, and the range over seeds."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({scale * min(values):.{digits}f}–{scale * max(values):.{digits}f})"
