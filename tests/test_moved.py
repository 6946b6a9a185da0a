"""Modules that have moved are found under their old names, with a word on the new ones."""

import importlib
import sys

import pytest

import sparsekit
from sparsekit._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module_and_says_so(old):
    sys.modules.pop(f"sparsekit.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"sparsekit\.{old} is now sparsekit\.{MOVED[old]}; import"):
        module = importlib.import_module(f"sparsekit.{old}")
    new = importlib.import_module(f"sparsekit.{MOVED[old]}")
    assert module is new
    assert new.__spec__.name == f"sparsekit.{MOVED[old]}"


def test_the_warning_points_at_the_line_that_imports():
    sys.modules.pop("sparsekit.estimators", None)
    with pytest.warns(DeprecationWarning) as caught:
        import sparsekit.estimators  # noqa: F401
    assert caught[0].filename == __file__


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_an_attribute_of_the_package_too(old):
    vars(sparsekit).pop(old, None)  # an import binds it
    with pytest.warns(DeprecationWarning, match=rf"sparsekit\.{old} is now") as caught:
        module = getattr(sparsekit, old)
    assert module is importlib.import_module(f"sparsekit.{MOVED[old]}")
    assert caught[0].filename == __file__


def test_what_was_never_there_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'sparsekit' has no attribute 'nothing'"):
        sparsekit.nothing  # noqa: B018
