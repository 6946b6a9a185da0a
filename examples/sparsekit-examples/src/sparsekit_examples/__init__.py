"""One saliency, pattern, schedule, task and preset for sparsekit."""

from collections.abc import Sequence

from sparsekit import Pattern, Preset, Saliency, Schedule, Task, hookimpl
from sparsekit_examples.pattern import Balanced
from sparsekit_examples.saliency import Lamp
from sparsekit_examples.schedule import Sine
from sparsekit_examples.task import Moons

#: The version of sparsekit's interfaces that this is written for.
SPARSEKIT_INTERFACE = 1

PRESET = Preset(
    name="lamp-balanced",
    reference="the documentation of sparsekit",
    settings={"estimator": "identity", "saliency": "lamp", "pattern": "balanced", "compensation": "none"},
)


@hookimpl
def sparsekit_saliencies() -> Sequence[type[Saliency]]:
    return [Lamp]


@hookimpl
def sparsekit_patterns() -> Sequence[type[Pattern]]:
    return [Balanced]


@hookimpl
def sparsekit_schedules() -> Sequence[type[Schedule]]:
    return [Sine]


@hookimpl
def sparsekit_tasks() -> Sequence[type[Task]]:
    return [Moons]


@hookimpl
def sparsekit_presets() -> Sequence[Preset]:
    return [PRESET]
