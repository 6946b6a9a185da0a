"""MLflow's addresses: invalid ones are refused, and they are shown without secrets."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from sparsekit.errors import SparsekitError

#: The schemes of MLflow's own stores; its plugins add others.
SCHEMES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


class TrackingError(SparsekitError):
    """The place where MLflow is to record runs cannot be used."""


def check(uri: str) -> None:
    """Refuse an invalid address of MLflow; whether a server answers is not checked.

    Raises:
        TrackingError: it is invalid; the message says what is valid.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return  # a path, or a word such as databricks
    known = [*SCHEMES, *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))]
    if scheme.partition("+")[0].lower() not in known:
        raise TrackingError(f"MLflow knows no addresses that begin with '{scheme}://'; known: {', '.join(known)}")
    if scheme.lower() in ("http", "https") and not _is_of_a_server(uri):
        raise TrackingError("the address of the MLflow server is not valid; give http://HOST:PORT, without white space")


def redacted(uri: str) -> str:
    """The address for files and messages: without user, password, query and fragment."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.partition("+")[0].lower() in ("sqlite", "file"):
        return uri
    _, at, rest = rest.rpartition("@")
    place = re.split(r"[?#]", rest, maxsplit=1)
    return f"{scheme}://{'***@' if at else ''}{place[0]}{'?***' if len(place) > 1 else ''}"


def without_secrets(text: str, uri: str) -> str:
    """A text that may contain an address, with `***` for the address's secrets."""
    text = text.replace(uri, redacted(uri))
    if redacted(uri) == uri:
        return text
    rest = uri.partition("://")[2]
    user, _, place = rest.rpartition("@")
    secrets = [user, *re.split(r"[?#]", place, maxsplit=1)[1:]]
    for secret in secrets:  # in messages of libraries; a short one may be any word
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return text


def _is_of_a_server(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 (raises where it is no number)
    except ValueError:
        return False
    return bool(parts.hostname) and re.search(r"[\s\x00-\x1f]", uri) is None
