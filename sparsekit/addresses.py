"""Addresses of MLflow as users give them: refused where they can be none, shown without what is secret in them."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from sparsekit.errors import SparsekitError

#: What MLflow itself can track to; its plugins add their own.
SCHEMES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


class TrackingError(SparsekitError):
    """The place where MLflow is to record runs cannot be used."""


def check(uri: str) -> None:
    """Refuse what can be no address of MLflow's, whether or not anybody answers there.

    Raises:
        TrackingError: with what an address is.
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
    """The address as it may be written and shown: without user, password and query."""
    return without_secrets(uri, uri)


def without_secrets(text: str, uri: str) -> str:
    """A text that may speak of an address, with `***` for what is secret in that."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return text
    user, at, _ = parts.netloc.rpartition("@")
    for secret in (user if at else "", parts.password or "", parts.query if parts.scheme != "sqlite" else ""):
        if secret:
            text = text.replace(secret, "***")
    return text


def _is_of_a_server(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 (raises where it is no number)
    except ValueError:
        return False
    return bool(parts.hostname) and re.search(r"[\s\x00-\x1f]", uri) is None
