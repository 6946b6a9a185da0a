"""A study of loss modelling: its file, and the comparison that it asks for.

Does a better model of the loss prune better? Criteria model what removing a weight costs; π sub-steps bound how far the
model has to reach; a norm penalty λ keeps it from moving far at once (Laurent et al., 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Literal

from pydantic import Field

from sparsekit.compare.spec import LONGEST_NAME, ComparisonSettings
from sparsekit.errors import SettingsError
from sparsekit.methods.estimators import Identity
from sparsekit.methods.interfaces import Settings
from sparsekit.registry.registry import Registry
from sparsekit.runs.settings import TrackingSettings, merge, resolve
from sparsekit.runs.validation import validated

#: Networks of one sparsity and one seed below which no correlation is taken.
FEWEST_NETWORKS = 4

#: Between a criterion and its λ in the name of a method.
JOINT = ", λ = "

#: What every run of a study has unless the file says otherwise: one criterion's mask and nothing else, measured on all
#: splits.
BASE: Mapping[str, object] = {
    "estimator": "identity",
    "schedule": "one-shot",
    "levels": "independent",
    "compensation": "none",
    "reconstruction": "none",
    "batch_norm": "kept",
    "also_measured": ["train", "tuning"],
}


class StudySettings(Settings):
    """A study: criteria × π × λ × further axes × seeds."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME, description="of the study; names its folder"
    )
    run: dict[str, object] = Field({}, description="settings of a run that all share")
    criteria: dict[str, dict[str, object]] = Field(
        min_length=1, description="name -> settings of a run: mostly a saliency, at times an estimator too"
    )
    substeps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 14, 140), min_length=1, description="π: cuts on the way, everything computed anew before each"
    )
    penalties: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0,), min_length=1, description="λ of the norm penalty, for criteria whose saliency has one"
    )
    axes: dict[str, object] = Field({}, description="further ones, as in a comparison's file")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="each network is made with each of them")
    networks: Literal["one", "each"] = Field("each", description="one dense network, or each seed its own")
    tracking: TrackingSettings = Field(TrackingSettings(), description="in MLflow")


def comparison(study: StudySettings, registry: Registry) -> ComparisonSettings:
    """The comparison whose methods are the study's criteria at each λ.

    A criterion that computes nothing from data (magnitude) is not done at each π: it would choose the same weights.

    Raises:
        SettingsError: a value is given twice, a criterion is not valid, or too few networks for a correlation.
    """
    for name, values in (("substeps", study.substeps), ("penalties", study.penalties)):
        if len(set(values)) < len(values):
            raise SettingsError(f"{name} = {list(values)} names a value twice; leave one out")
    methods: dict[str, dict[str, object]] = {}
    networks, axes = 0, {"substeps": list(study.substeps), **study.axes}
    for name, given in study.criteria.items():
        if JOINT in name:
            raise SettingsError(f"the criterion '{name}' has '{JOINT}' in its name, which parts a name from its λ")
        resolved = resolve({**merge(BASE, study.run, given), "seed": study.seeds[0]}, registry)
        saliency = resolved.saliency
        from_data = saliency.cls.takes_gradient or resolved.estimator.cls is not Identity
        own = given if from_data else {"substeps": 1, **given}
        free = [values for axis, values in axes.items() if axis not in own]
        penalties = study.penalties if "penalty" in saliency.cls.Settings.model_fields else (None,)
        for penalty in penalties:
            at = {} if penalty is None else {"saliency": {"name": saliency.cls.name, "penalty": penalty}}
            methods[name if penalty is None else f"{name}{JOINT}{penalty:g}"] = merge(own, at)
            networks += prod(len(values) if isinstance(values, (list, dict)) else 1 for values in free)
    if networks < FEWEST_NETWORKS:
        raise SettingsError(
            f"the study has {networks} networks of a seed, and correlations need {FEWEST_NETWORKS} at least; give more "
            "criteria, substeps or penalties"
        )
    file = {
        "name": study.name,
        "run": merge(BASE, study.run),
        "methods": methods,
        "axes": axes,
        "seeds": list(study.seeds),
        "networks": study.networks,
        "study": True,
        "tracking": study.tracking.model_dump(),
    }
    return validated(ComparisonSettings, file, "")
