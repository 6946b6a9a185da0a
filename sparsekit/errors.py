"""What can be wrong with what a user asked for: one clear sentence each, never a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsekitError(Exception):
    """What was asked for cannot be done; the message says what was given, what was needed and what to do."""


class SettingsError(SparsekitError):
    """A setting, a name or a configuration file is not valid."""


class PluginError(SparsekitError):
    """A plugin that was asked for cannot be used."""


class DataError(SparsekitError):
    """A data set, a checkpoint or a batch is missing or not what was needed."""


class ModelError(SparsekitError):
    """The network cannot be pruned as asked."""


class CurvatureError(SparsekitError):
    """A curvature estimate is not finite, not positive definite, or did not converge."""


class RecordError(SparsekitError):
    """A run's directory cannot be read, written or resumed."""


class DamagedError(RecordError):
    """A file that a run has written is not whole any more; what it held can only be made again."""


class DegradedWarning(UserWarning):
    """What was asked for was done, and went less well than it should have."""


def unknown_name(kind: str, given: str, known: Iterable[str], hint: str = "") -> str:
    """The sentence for a name that is not known: the nearest known name, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else "."
    return f"no {kind} '{given}'{guess} Known: {', '.join(names) or 'none'}.{' ' + hint if hint else ''}"
