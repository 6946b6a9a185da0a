"""Values that every settings model accepts: text that can be written to a file, and proper numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args, get_origin

#: Integers have at most 63 bits, as in torch.
LARGEST = 2**63 - 1


def as_number(annotation: object, given: object) -> object:
    """`given`, after checking it where the annotation asks for numbers.

    Raises:
        ValueError: it is true, false or an integer of more than 63 bits, or a sequence that contains one.
    """
    kinds = _kinds(annotation)
    if not kinds & {int, float} or bool in kinds:
        return given
    for value in given if isinstance(given, list | tuple) else (given,):
        if isinstance(value, bool):
            raise ValueError("a number was needed, and true or false is none")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"a number of at most {LARGEST} was needed")
    return given


def _kinds(annotation: object) -> set[object]:
    """The plain types in an annotation."""
    if get_origin(annotation) is Literal:
        return set()
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*map(_kinds, parts))


def unwritable(given: object) -> str | None:
    """The first text, among keys and values, that cannot be in a file or its name; None if there is none."""
    if isinstance(given, str):
        return given if "\0" in given or any("\ud800" <= c <= "\udfff" for c in given) else None
    if isinstance(given, Mapping):
        given = [part for pair in given.items() for part in pair]
    parts = given if isinstance(given, Sequence) and not isinstance(given, bytes) else ()
    return next((found for found in map(unwritable, parts) if found is not None), None)


def shown(given: object, most: int = 200) -> str:
    """The value's repr for messages; the middle of a long one is left out."""
    try:
        text = repr(given)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of too many digits"
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
