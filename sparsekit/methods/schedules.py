"""The built-in schedules, and the list of steps that a schedule gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparsekit.errors import SettingsError
from sparsekit.methods.interfaces import Schedule

#: Largest number of cuts in one run, each of which is listed, checkpointed and recorded.
MOST_CUTS = 100_000


class OneShot(Schedule):
    """One cut to the target, whatever `steps` is."""

    name: ClassVar[str] = "one-shot"

    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """(target,)."""
        return (target,)


class Cubic(Schedule):
    """s_t = s_f + (s_0 − s_f)(1 − t/T)³: large cuts first (Zhu and Gupta, 2017)."""

    name: ClassVar[str] = "cubic"

    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """By the formula above."""
        return [*(target + (start - target) * (1 - t / steps) ** 3 for t in range(1, steps)), target]


class Linear(Schedule):
    """s_t = s_0 + (s_f − s_0) t/T."""

    name: ClassVar[str] = "linear"

    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """By the formula above."""
        return [*(start + (target - start) * t / steps for t in range(1, steps)), target]


class Exponential(Schedule):
    """The kept fraction falls by the same factor at every step (Laurent et al., 2020)."""

    name: ClassVar[str] = "exponential"

    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """1 − (1 − s_0) ((1 − s_f)/(1 − s_0))^{t/T}."""
        ratio = (1 - target) / (1 - start)
        return [*(1 - (1 - start) * ratio ** (t / steps) for t in range(1, steps)), target]


@dataclass(frozen=True)
class Step:
    """One step: a cut, and what is done before and after it.

    Attributes:
        index: 0, 1, ….
        sparsity: the fraction removed in all after the cut.
        restart: start from the dense weights and the full mask.
        refresh: update the curvature at the present weights before the cut.
        finetune: fine-tune after the cut.
        level: index of the sparsity level that this step leads to.
        completes_level: whether that level is reached and reported after it.
    """

    index: int
    sparsity: float
    restart: bool
    refresh: bool
    finetune: bool
    level: int
    completes_level: bool


def check_cuts(levels: int, steps: int, substeps: int) -> None:
    """Refuse a plan with more than MOST_CUTS cuts.

    Raises:
        SettingsError: with the number of cuts.
    """
    if levels * steps * substeps > MOST_CUTS:
        raise SettingsError(
            f"{levels} levels × {steps:,} steps × {substeps:,} substeps are {levels * steps * substeps:,} cuts; at "
            f"most {MOST_CUTS:,} can be made in one run: set fewer steps or substeps"
        )


def plan(
    levels: Sequence[float],
    schedule: Schedule,
    *,
    steps: int = 1,
    substeps: int = 1,
    spacing: Schedule | None = None,
    finetune: bool = False,
    independent: bool = False,
) -> list[Step]:
    """All steps of a run.

    Args:
        levels: the sparsities to report, increasing.
        schedule: how sparsity grows from one level to the next.
        steps: steps for each level, fine-tuned after each if `finetune`.
        substeps: cuts within a step, with the curvature refreshed before each and no fine-tuning between them.
        spacing: of these cuts; by default the kept fraction falls by the same factor at each.
        finetune: see above.
        independent: each level starts from the dense weights; where a level is one cut, all share the curvature
            estimated there. Otherwise each level starts from the previous one.
    """
    within = spacing or Exponential(None)
    out: list[Step] = []
    at_dense = False  # whether the last refresh was at the dense weights
    for level, target in enumerate(levels):
        begin = 0.0 if independent or level == 0 else levels[level - 1]
        previous = begin
        for step, stop in enumerate(waypoints := list(schedule.sparsities(begin, target, steps))):
            parts = within.sparsities(previous, stop, substeps)
            for part, sparsity in enumerate(parts):
                restart = independent and step == 0 and part == 0
                refresh = not (restart and at_dense)
                at_dense = restart or (at_dense and not refresh)
                last_of_step = part == len(parts) - 1
                out.append(
                    Step(
                        index=len(out),
                        sparsity=sparsity,
                        restart=restart,
                        refresh=refresh,
                        finetune=finetune and last_of_step,
                        level=level,
                        completes_level=last_of_step and step == len(waypoints) - 1,
                    )
                )
            previous = stop
    return out


#: How sub-steps are spaced, by name.
SPACINGS = {schedule.name: schedule for schedule in (Exponential, Linear)}
