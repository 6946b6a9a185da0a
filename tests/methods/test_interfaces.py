"""Interfaces stand in a module each, under the names that they always had."""

import pytest

import sparsekit
from sparsekit.methods import estimators, interfaces


@pytest.mark.parametrize("name", sorted(set(interfaces.__all__) & set(sparsekit.__all__)))
def test_the_door_and_the_interfaces_have_the_same_object(name):
    assert getattr(interfaces, name) is getattr(sparsekit, name)


def test_block_fisher_is_found_among_the_estimators():
    assert estimators.BlockFisher is sparsekit.BlockFisher


def test_a_component_need_not_name_its_settings():
    class Plain(sparsekit.Schedule):
        def sparsities(self, start, target, steps):
            return [target]

    assert Plain(None).sparsities(0.0, 0.5, 1) == [0.5]
