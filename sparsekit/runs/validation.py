"""Settings from raw values, with one sentence for each error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sparsekit.errors import SettingsError
from sparsekit.methods.plain_values import shown, unwritable

T = TypeVar("T", bound=BaseModel)

#: The components of a run: each has a name and its own settings.
COMPONENTS = ("task", "estimator", "saliency", "schedule", "pattern")

#: The key that a plain string stands for where a mapping is expected: `estimator: obs` is `estimator: {name: obs}`.
SHORTHAND = {
    **dict.fromkeys(COMPONENTS, "name"),
    "compensation": "how",
    "reconstruction": "how",
    "batch_norm": "statistics",
}


def validated(model: type[T], raw: Mapping[str, object], where: str) -> T:
    """An instance of `model` from raw values; each error is one sentence."""
    if (text := unwritable(raw)) is not None:
        raise SettingsError(
            f"{shown(text)} holds a character that no file can hold (NUL, or half of a pair); leave it out"
        )
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        raise SettingsError("; ".join(_sentences(model, error.errors(), where))) from None


def _sentences(model: type[BaseModel], faults: Sequence[ErrorDetails], where: str) -> list[str]:
    """A sentence each; those that end in the same list of known settings give it once."""
    sentences = [_sentence(model, item, where) for item in faults]
    ends = [sentence.rpartition(" Known: ")[2] for sentence in sentences]
    return [
        sentence.removesuffix(f" Known: {end}").removesuffix(".") if end in ends[i + 1 :] else sentence
        for i, (sentence, end) in enumerate(zip(sentences, ends, strict=True))
    ]


def _sentence(model: type[BaseModel], item: ErrorDetails, where: str) -> str:
    location = [str(part) for part in item["loc"]]
    path = ".".join(([where] if where else []) + location)
    if item["type"] == "extra_forbidden":
        fields = list(_fields_at(model, location[:-1]))
        near = difflib.get_close_matches(location[-1], fields, n=1)
        guess = f"; did you mean '{near[0]}'?" if near else "."
        return f"there is no setting '{path}'{guess} Known: {', '.join(sorted(fields))}"
    message = item["msg"].removeprefix("Value error, ")
    if not path:
        return str(message)
    if item["type"] == "model_type":
        word = f", or one word for its '{SHORTHAND[path]}'" if path in SHORTHAND else ""
        message = f"a mapping of settings is needed{word}"
    return f"{path} = {shown(item['input'])} is not valid: {message[0].lower()}{message[1:]}"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> Mapping[str, object]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return model.model_fields
