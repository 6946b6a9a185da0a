"""The settings of a run as frozen data: read from YAML and options, validated before any data is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from sparsekit.errors import SettingsError
from sparsekit.methods.interfaces import (
    BatchNormSettings,
    CompensationSettings,
    CurvatureEstimator,
    EstimatorSettings,
    FinetuneSettings,
    Pattern,
    ReconstructionSettings,
    Saliency,
    Schedule,
    Settings,
    Split,
    Task,
    TaskSettings,
)
from sparsekit.methods.plain_values import shown
from sparsekit.methods.schedules import check_cuts
from sparsekit.registry.registry import Registry
from sparsekit.runs import yaml_reading
from sparsekit.runs.addresses import redacted
from sparsekit.runs.validation import COMPONENTS, SHORTHAND, validated

Sparsity = Annotated[float, Field(ge=0, lt=1, description="fraction of the prunable weights removed, in [0, 1)")]

C = TypeVar("C")
S = TypeVar("S", bound=Settings)


class TrackingSettings(Settings):
    """The settings of tracking in MLflow."""

    enabled: bool = Field(True, description="--no-tracking turns it off")
    uri: str | None = Field(
        None,
        description="MLflow's address; default $MLFLOW_TRACKING_URI, else a SQLite file under the output",
    )
    experiment: str = Field("sparsekit", min_length=1, max_length=250, description="MLflow experiment")

    @field_validator("uri")
    @classmethod
    def _an_address(cls, given: str | None) -> str | None:
        if given is not None and (fault := fault_of(given)) is not None:
            raise ValueError(fault)
        return given


def fault_of(address: str) -> str | None:
    """Why an HTTP address is invalid; None if it is valid or has another scheme."""
    if not address.lower().startswith(("http:", "https:")):
        return None
    if any(c.isspace() or not c.isprintable() for c in address):
        return "an address without spaces was needed, such as http://localhost:5000"
    try:
        parts = urlsplit(address)
        whole = bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError as error:
        return f"it is no address ({error}); one such as http://localhost:5000 was needed"
    return None if whole else "an address with a host was needed, such as http://localhost:5000"


class RunSettings(Settings):
    """The settings of a run. A component's own settings are in the same mapping as its `name`."""

    preset: str | None = Field(None, description="published configuration that the rest was laid over")
    task: dict[str, object] = Field({"name": "digits"}, description="what is pruned and how it is measured")
    estimator: dict[str, object] = Field({"name": "fishleg"}, description="of the inverse Fisher")
    saliency: dict[str, object] = Field({"name": "obs"}, description="which weights go first")
    pattern: dict[str, object] = Field({"name": "unstructured"}, description="which sets of weights may go together")
    schedule: dict[str, object] = Field({"name": "cubic"}, description="how sparsity grows from level to level")
    sparsity: tuple[Sparsity, ...] = Field((), description="levels to report; default the task's")
    steps: int = Field(4, ge=1, description="steps for each level, except one-shot's single one")
    substeps: int = Field(1, ge=1, description="cuts within a step, curvature refreshed before each")
    spacing: Literal["exponential", "linear"] = Field(
        "exponential", description="of those cuts: the kept fraction falls by one factor, or by equal parts"
    )
    levels: Literal["auto", "independent", "sequential"] = Field(
        "auto",
        description="each level from the dense weights, or all on one path; auto: independent for one-shot "
        "without sub-steps and fine-tuning",
    )
    compensation: CompensationSettings = Field(CompensationSettings(), description="how the surviving weights move")
    reconstruction: ReconstructionSettings = Field(
        ReconstructionSettings(), description="whether layers are fitted to the dense network's after a cut"
    )
    batch_norm: BatchNormSettings = Field(
        BatchNormSettings(), description="whether batch norm statistics are taken anew after a cut"
    )
    finetune: dict[str, object] = Field({}, description="masked training after each step; default the task's")
    split: Split = Field("reporting", description="examples that metrics are measured on; tune on 'tuning'")
    also_measured: tuple[Split, ...] = Field((), description="other examples; their metrics are named SPLIT/METRIC")
    seed: int = Field(0, ge=0, description="of calibration examples, sampled labels and fine-tuning order")
    device: str = Field("auto", pattern=r"^(auto|cpu|[a-z]+(:[0-9]{1,3})?)$", description="auto, cpu, cuda or cuda:N")
    include: tuple[str, ...] | None = Field(None, description="shell patterns of parameter names to prune")
    exclude: tuple[str, ...] = Field((), description="shell patterns of parameter names to leave alone")
    output: str = Field("runs", description="folder of the runs' directories")
    tracking: TrackingSettings = Field(TrackingSettings(), description="in MLflow")

    @property
    def users_of_examples(self) -> dict[str, ReconstructionSettings | BatchNormSettings]:
        """Name of a setting -> its value, for those parts of this run that take training examples besides curvature."""
        users: dict[str, ReconstructionSettings | BatchNormSettings] = {}
        if self.reconstruction.how != "none":
            users["reconstruction"] = self.reconstruction
        if self.batch_norm.statistics == "anew":
            users["batch_norm"] = self.batch_norm
        return users

    @field_validator("sparsity", mode="before")
    @classmethod
    def _one_level(cls, given: object) -> object:
        """Accept a single level that is not in a list."""
        return (given,) if isinstance(given, int | float | str) else given


@dataclass(frozen=True)
class Component(Generic[C, S]):
    """A component's class with its settings.

    Attributes:
        cls: its class.
        settings: validated.
    """

    cls: type[C]
    settings: S

    def build(self, *given: object) -> C:
        """The component; `given` are its constructor's arguments before the settings."""
        make: Callable[..., C] = self.cls
        return make(*given, self.settings)


@dataclass(frozen=True)
class ResolvedRun:
    """The settings of a run with all names resolved and the settings of all components validated.

    Attributes:
        settings: the run's.
        task, estimator, saliency, schedule, pattern: the components.
        finetune: the task's recipe with the run's changes.
        sparsity: increasing.
        independent: whether each level starts from the dense weights.
        chosen: names of the settings that nobody gave, and that are the estimator's defaults.
    """

    settings: RunSettings
    task: Component[Task, TaskSettings]
    estimator: Component[CurvatureEstimator, EstimatorSettings]
    saliency: Component[Saliency, Settings]
    schedule: Component[Schedule, Settings]
    pattern: Component[Pattern, Settings]
    finetune: FinetuneSettings
    sparsity: tuple[float, ...]
    independent: bool
    chosen: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """All resolved settings as plain data: the content of `run.yaml`, which `--config` reads."""
        out = self.settings.model_dump(mode="json")
        for kind, name in self.names.items():
            out[kind] = {"name": name, **getattr(self, kind).settings.model_dump(mode="json")}
        out["finetune"] = self.finetune.model_dump(mode="json")
        out["sparsity"] = list(self.sparsity)
        if self.settings.tracking.uri is not None:  # records are shared, so they hold no secrets
            out["tracking"]["uri"] = redacted(self.settings.tracking.uri)
        return out

    @property
    def names(self) -> dict[str, str]:
        """Kind of component -> name."""
        return {
            "task": self.task.cls.name,
            "estimator": self.estimator.cls.name,
            "saliency": self.saliency.cls.name,
            "schedule": self.schedule.cls.name,
            "pattern": self.pattern.cls.name,
        }

    def without_reconstruction(self) -> ResolvedRun:
        """This run without any reconstruction."""
        return replace(self, settings=self.settings.model_copy(update={"reconstruction": ReconstructionSettings()}))

    def fitted(self, available: int) -> ResolvedRun:
        """This run with its default numbers of examples limited to those `available`.

        Numbers that were set are unchanged, and so are those that the other settings do not allow to be smaller.
        """
        options, settings = self.estimator.settings, self.settings
        estimator, most = self.settings.estimator, options.fitting(min(options.examples, available))
        if "examples" not in estimator and 0 < most < options.examples:
            with suppress(SettingsError):  # too few of them: who asks for the examples says so
                options = validated(type(options), {**options.model_dump(), "examples": most}, "estimator")
                estimator = {**estimator, "examples": most}
        changed: dict[str, object] = {} if estimator is settings.estimator else {"estimator": estimator}
        for name, part in settings.users_of_examples.items():
            if "examples" not in part.model_fields_set and 0 < available < part.examples:
                changed[name] = part.model_copy(update={"examples": available})
        if not changed:
            return self
        return replace(
            self, settings=settings.model_copy(update=changed), estimator=replace(self.estimator, settings=options)
        )


def resolve(raw: Mapping[str, object], registry: Registry) -> ResolvedRun:
    """Validate a run's raw settings: names and values, no data.

    `preset` names a published configuration; all other given settings override it.

    Raises:
        SettingsError, PluginError: a setting is invalid; the message says which, what was given and what was needed.
    """
    if raw.get("preset") is not None:
        raw = _over_preset(raw, registry)
    names = {kind: RunSettings.model_fields[kind].get_default() for kind in COMPONENTS}
    own = _of_estimator(merge(names, raw), registry)
    settings = validated(RunSettings, merge(names, own, raw), "")
    task: Component[Task, TaskSettings] = _component(settings.task, "task", registry)
    estimator: Component[CurvatureEstimator, EstimatorSettings] = _component(settings.estimator, "estimator", registry)
    saliency: Component[Saliency, Settings] = _component(settings.saliency, "saliency", registry)
    schedule: Component[Schedule, Settings] = _component(settings.schedule, "schedule", registry)
    pattern: Component[Pattern, Settings] = _component(settings.pattern, "pattern", registry)
    _check_together(settings, estimator, saliency.cls, pattern.cls)
    estimator = replace(estimator, settings=_with_examples(settings, saliency.cls, estimator.settings))
    recipe = validated(FinetuneSettings, {**task.cls.finetune.model_dump(), **settings.finetune}, "finetune")
    if recipe.refine_every and not recipe.epochs:
        raise SettingsError(
            f"finetune.refine_every = {recipe.refine_every} updates the estimator while fine-tuning, of which there is "
            "none; set finetune.epochs, or leave refine_every out"
        )
    if settings.reconstruction.how != "none":
        fitted = settings.reconstruction.with_ridge(trained=recipe.epochs > 0)
        settings = settings.model_copy(update={"reconstruction": fitted})
    sparsity = tuple(sorted(set(settings.sparsity or task.cls.sparsity)))
    check_cuts(len(sparsity), settings.steps, settings.substeps)
    one_cut = schedule.cls.name == "one-shot" and settings.substeps == 1 and recipe.epochs == 0
    independent = one_cut if settings.levels == "auto" else settings.levels == "independent"
    chosen = frozenset(own) - frozenset(raw)
    return ResolvedRun(settings, task, estimator, saliency, schedule, pattern, recipe, sparsity, independent, chosen)


def _of_estimator(raw: Mapping[str, object], registry: Registry) -> Mapping[str, object]:
    """The defaults of a run with the estimator that is named in `raw`; none beside a preset."""
    given = raw["estimator"]
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or raw.get("preset") is not None:
        return {}
    return registry.get("estimator", name).run_defaults


def _component(given: Mapping[str, object], kind: str, registry: Registry) -> Component[Any, Any]:
    """The component described by a mapping with its name and settings."""
    name = given.get("name")
    if not isinstance(name, str):
        raise SettingsError(f"{kind} needs a name; known: {', '.join(registry.names(kind))}")
    cls = registry.get(kind, name)
    own = {key: value for key, value in given.items() if key != "name"}
    return Component(cls, validated(cls.Settings, own, kind))


def _check_together(
    settings: RunSettings,
    estimator: Component[CurvatureEstimator, EstimatorSettings],
    saliency: type[Saliency],
    pattern: type[Pattern],
) -> None:
    """Refuse components that are valid by themselves but not together."""
    unit = estimator.cls.unit(estimator.settings)
    if pattern.across_layers and unit == "layer":
        raise SettingsError(
            f"the scores of the estimator '{estimator.cls.name}' compare within a layer only, and the pattern "
            f"'{pattern.name}' compares layers; use --pattern uniform or n:m"
        )
    how = settings.compensation
    if how.how == "exact" and how.damping is None and unit != "loss":
        raise SettingsError(
            f"the damping of the estimator '{estimator.cls.name}' is not in units of the Fisher; give exact "
            "compensation its own: compensation.damping"
        )
    if saliency.of_groups and not pattern.has_groups():
        raise SettingsError(
            f"the saliency '{saliency.name}' scores groups, and the pattern '{pattern.name}' has "
            "none; use it with --pattern n:m or block"
        )


def _with_examples(settings: RunSettings, saliency: type[Saliency], options: EstimatorSettings) -> EstimatorSettings:
    """The estimator's settings, with the usual number of examples where it uses none but another component does."""
    if options.examples:
        return options
    for what, takes in (
        (f"the saliency '{saliency.name}'", saliency.takes_gradient),
        ("exact compensation", settings.compensation.how == "exact"),
        ("compensation.first_order", settings.compensation.first_order > 0),
        ("reconstruction", settings.reconstruction.how != "none"),
    ):
        if takes and "examples" in settings.estimator:
            raise SettingsError(f"estimator.examples = 0, and {what} needs examples; give a number, or leave it out")
        if takes:
            return options.model_copy(update={"examples": EstimatorSettings().examples})
    return options


def _over_preset(raw: Mapping[str, object], registry: Registry) -> dict[str, object]:
    """The preset's settings, overridden by the rest of `raw`."""
    preset = raw["preset"]
    if not isinstance(preset, str):
        raise SettingsError(f"preset = {preset!r} is not a name; known: {', '.join(registry.names('preset'))}")
    published, given = (merge({}, layer) for layer in (registry.get("preset", preset).settings, raw))
    estimators = [layer.get("estimator") for layer in (published, given)]
    its, other = (e.get("name") if isinstance(e, Mapping) else None for e in estimators)
    if its is not None and other is not None and its != other:
        # Another name discards a component's settings: the preset's examples, blocks and damping would be lost.
        raise SettingsError(
            f"the preset '{preset}' is for the estimator '{its}', and '{other}' was given; leave --estimator out, or "
            "the preset"
        )
    return merge(published, given)


# -- reading -----------------------------------------------------------------------------------------------
def read_config(path: Path) -> dict[str, object]:
    """The settings in a YAML file.

    Raises:
        SettingsError: it is missing, unreadable, too large, or not a mapping.
    """
    data = yaml_reading.read(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(
            f"the configuration file '{path}' must hold a mapping of settings, not a {type(data).__name__}"
        )
    return {str(key): value for key, value in data.items()}


def merge(*layers: Mapping[str, object]) -> dict[str, object]:
    """Nested mappings merged: later values override earlier ones, a component of another name replaces the earlier."""
    out: dict[str, object] = {}
    for layer in layers:
        for key, given in layer.items():
            value = {SHORTHAND[key]: given} if key in SHORTHAND and isinstance(given, str) else given
            old = out.get(key)
            if isinstance(old, dict) and isinstance(value, Mapping):
                renamed = key in COMPONENTS and "name" in old and value.get("name", old["name"]) != old["name"]
                out[key] = dict(value) if renamed else merge(old, value)
            else:
                out[key] = value
    return out


def parse_assignment(text: str) -> dict[str, object]:
    """`estimator.damping=1e-3` -> {"estimator": {"damping": 0.001}}; values are YAML."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > yaml_reading.MOST_LEVELS:
        raise SettingsError(f"--set needs KEY=VALUE such as estimator.damping=1e-3; {shown(text)} was given")
    try:
        parsed: object = yaml_reading.parse(value)
    except ValueError as error:
        raise SettingsError(f"the value in --set {shown(text)} is not YAML that can be used: {error}") from None
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            parsed = float(parsed)
    for key in reversed(keys):
        parsed = {key: parsed}
    return cast(dict[str, object], parsed)
