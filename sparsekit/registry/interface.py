"""Whether a plugin and this sparsekit fit together."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from sparsekit.errors import PluginError
from sparsekit.methods.interfaces import INTERFACE_VERSION

#: The module attribute in which a plugin may say which version of the interfaces it is written for.
DECLARED = "SPARSEKIT_INTERFACE"


def check_interface(module: object, distribution: str) -> None:
    """Refuse a plugin for other interfaces, or one whose distribution requires another sparsekit.

    A plugin that declares nothing is taken as it is: what does not fit then shows when it is used.

    Raises:
        PluginError: with what to install.
    """
    declared = getattr(module, DECLARED, None)
    if declared is not None and declared != INTERFACE_VERSION:
        newer = isinstance(declared, int) and declared > INTERFACE_VERSION
        what = "install a newer sparsekit" if newer else "install a newer version of the plugin"
        raise PluginError(
            f"it is written for version {declared} of sparsekit's interfaces ({DECLARED}), this sparsekit has "
            f"{INTERFACE_VERSION}; {what}"
        )
    try:
        here = metadata.version("sparsekit")
        required = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # run from a folder of sources, or no distribution's
        return
    for text in required:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "sparsekit" and applies and not requirement.specifier.contains(here, prereleases=True):
            raise PluginError(
                f"its distribution requires {text}, and sparsekit {here} is installed; install one that fits"
            )
