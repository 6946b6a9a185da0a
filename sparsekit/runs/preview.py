"""The preview of a run, and checks that it can work, before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekit.errors import DataError
from sparsekit.machine import available_memory, find_device
from sparsekit.methods.interfaces import Task
from sparsekit.methods.schedules import SPACINGS, Step, plan
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.runs.settings import ResolvedRun


@dataclass(frozen=True)
class Preview:
    """The preview of a run, computed without reading data.

    Attributes:
        space: prunable parameters, and the skipped ones with reasons.
        steps: the plan.
        memory: bytes that the estimator will need.
        structures: name of a parameter -> how its curvature is modelled, where the estimator describes it.
        settings: resolved.
        device: of the run.
    """

    space: ParameterSpace
    steps: list[Step]
    memory: int
    structures: dict[str, str]
    settings: dict[str, object]
    device: str


def preview(resolved: ResolvedRun) -> Preview:
    """The content of `--dry-run`; also refuses patterns, devices and models that cannot work."""
    device = find_device(resolved.settings.device)
    task = resolved.task.build()
    settings = resolved.settings
    network = task.network()
    space = ParameterSpace.of(network, include=settings.include, exclude=settings.exclude)
    check_sparsities(resolved, space)
    estimator, options = resolved.estimator.cls, resolved.estimator.settings
    estimator.check(network, space, options, available_memory(device))
    structures = dict(estimator.describe(space, options))
    memory = estimator.memory(space, options)
    return Preview(space, planned(resolved), memory, structures, resolved.as_dict(), str(device))


def check_sparsities(resolved: ResolvedRun, space: ParameterSpace) -> None:
    """Refuse sparsities that the pattern cannot reach on these weights."""
    pattern = resolved.pattern.build()
    for sparsity in resolved.sparsity:
        pattern.count(space, sparsity)


def planned(resolved: ResolvedRun) -> list[Step]:
    """The steps of a run."""
    settings = resolved.settings
    return plan(
        resolved.sparsity,
        resolved.schedule.build(),
        steps=settings.steps,
        substeps=settings.substeps,
        spacing=SPACINGS[settings.spacing](None),
        finetune=resolved.finetune.epochs > 0,
        independent=resolved.independent,
    )


def with_examples(resolved: ResolvedRun, task: Task) -> ResolvedRun:
    """The run with default numbers of examples limited to those that the task has, see `ResolvedRun.fitted`.

    Raises:
        DataError: more are asked for than the task has; the message says how many are possible.
    """
    available, measured = task.size("train"), resolved.settings.split
    for split in ("train", measured):
        if not task.size(split):
            raise DataError(
                f"the task '{task.name}' has no examples in its {split} split: tuning and reporting take every second "
                "test example each, so a test set needs two at least; mend the data"
            )
    resolved = resolved.fitted(available)
    given = resolved.estimator.settings
    if given.examples > available:
        most, name = given.fitting(available), resolved.estimator.cls.name
        raise DataError(
            f"the estimator '{name}' needs {given.examples} calibration examples, the task '{task.name}' has "
            f"{available}; "
            + (f"set estimator.examples={most}, the most that will do" if most else "its other settings allow no fewer")
        )
    for part, settings in resolved.settings.users_of_examples.items():
        if settings.examples > available:
            raise DataError(
                f"{part} needs {settings.examples} training examples, the task '{task.name}' has {available}; set "
                f"{part}.examples={available} or less"
            )
    return resolved
