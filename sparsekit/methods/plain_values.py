"""What settings may hold at all, whatever their models say: text that can be written, numbers that are numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args, get_origin

#: Whole numbers have at most 63 bits, as torch's have.
LARGEST = 2**63 - 1


def as_number(annotation: object, given: object) -> object:
    """`given`, unless the annotation asks for numbers and true, false or an integer of more than 63 bits is given.

    Raises:
        ValueError: such a value, alone or in a sequence.
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
    """The plain types that an annotation is made of."""
    if get_origin(annotation) is Literal:
        return set()
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*map(_kinds, parts))


def unwritable(given: object) -> str | None:
    """The first text, among keys and values, that no file name and no file of ours could hold; None: all can."""
    if isinstance(given, str):
        return given if "\0" in given or any("\ud800" <= c <= "\udfff" for c in given) else None
    if isinstance(given, Mapping):
        given = [part for pair in given.items() for part in pair]
    parts = given if isinstance(given, Sequence) and not isinstance(given, bytes) else ()
    return next((found for found in map(unwritable, parts) if found is not None), None)


def shown(given: object, most: int = 200) -> str:
    """As it is written in Python, for messages; its middle is left out where it is long."""
    try:
        text = repr(given)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of too many digits"
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
