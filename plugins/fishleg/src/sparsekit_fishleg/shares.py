"""Which calibration examples do what: the closed form, auxiliary steps, and the judgement of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from sparsekit import DataError, Objective
from sparsekit_fishleg.settings import FishLegSettings

REMEDY = "give more estimator.examples, lower estimator.batch_size, or set estimator.auxiliary_steps=0"


class Shares(NamedTuple):
    """The calibration examples by use, in whole batches.

    Attributes:
        closed_form: bases and spectrum.
        steps: auxiliary steps, one batch each: the same, or with `start_examples` the others.
        held: those that the fit is judged on; without batches where nothing is judged.
    """

    closed_form: Objective
    steps: Objective
    held: Objective


def shares(objective: Objective, settings: FishLegSettings) -> Shares:
    """Divide an update's examples as the settings say.

    Raises:
        DataError: there are too few batches.
    """
    given = objective.batches
    batches = given if isinstance(given, Sequence) else list(given)  # a sequence may be lazy, or tell of progress
    closed, left = division(len(batches), settings)
    objective = replace(objective, share=objective.mean_share)  # parts of it weigh their examples as the whole does
    return Shares(
        replace(objective, batches=batches[:closed]),
        replace(objective, batches=batches[:left] if closed == left else batches[closed:left]),
        replace(objective, batches=batches[left:]),
    )


def division(count: int, settings: FishLegSettings) -> tuple[int, int]:
    """Of `count` batches: how many the closed form has, and how many are not held out.

    Raises:
        DataError: there are too few.
    """
    held = settings.held_out_batches(count)
    if held and held >= count:
        raise DataError(
            f"fishleg holds out {held} of {count} calibration batches to judge its fit and has none to learn from; "
            f"{REMEDY}"
        )
    left = count - held
    if settings.start_examples is None:
        closed = left
    elif (closed := -(-settings.start_examples // settings.batch_size)) >= left:
        raise DataError(
            f"fishleg with start_examples={settings.start_examples} leaves none of {left} calibration batches for "
            "auxiliary steps; give more estimator.examples, or lower estimator.start_examples"
        )
    if settings.spectrum == "others" and closed < 2:
        raise DataError(
            "fishleg with spectrum=others needs two calibration batches at least for its closed form, and has one; "
            "give more estimator.examples, or lower estimator.batch_size"
        )
    return closed, left


def halves(objective: Objective) -> tuple[Objective, Objective]:
    """The first half of the batches, rounded up, and the others; there are two at least, see `division`."""
    batches = objective.batches
    assert isinstance(batches, Sequence)
    middle = -(-len(batches) // 2)
    return replace(objective, batches=batches[:middle]), replace(objective, batches=batches[middle:])
