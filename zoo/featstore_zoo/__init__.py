"""Acoustic models and vocoders that consume a store, one package each. torch lives here; importing this loads none."""

from __future__ import annotations

import difflib
import importlib
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

__all__ = ["TABLE", "Listed", "catalogue", "find"]

GROUP = "featstore.zoo"  # entry points of third parties: name = "module"
PARTS = ("KIND", "Config", "Model", "losses")
KINDS = ("acoustic", "vocoder")

TABLE: dict[str, str] = {
    "hifigan": "featstore_zoo.hifigan",
    "nsf_hifigan": "featstore_zoo.nsf_hifigan",
    "bigvgan": "featstore_zoo.bigvgan",
    "melgan": "featstore_zoo.melgan",
    "apnet": "featstore_zoo.apnet",
    "vocos": "featstore_zoo.vocos",
    "diffwave": "featstore_zoo.diffwave",
    "diffwavenet_svc": "featstore_zoo.diffwavenet_svc",
    "transformer_svc": "featstore_zoo.transformer_svc",
    "como_svc": "featstore_zoo.como_svc",
    "vits_svc": "featstore_zoo.vits_svc",
}


class Listed(NamedTuple):
    """A model as `catalogue` lists it. `parameters`: of the network that is used, without what only training needs."""

    name: str
    kind: str
    preset: str
    parameters: int
    says: str


def catalogue() -> list[Listed]:
    """Every model with each of its presets, counted without making its weights."""
    import torch

    found = []
    for name in (*TABLE, *(point.name for point in metadata.entry_points(group=GROUP))):
        package = find(name)
        for preset in getattr(package.Config, "PRESETS", None) or ("",):
            config = package.Config.preset(preset) if preset else package.Config()
            with torch.device("meta"):
                count = sum(weight.numel() for weight in package.Model(config).parameters())
            says = (package.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
            found.append(Listed(name.replace("_", "-"), package.KIND, preset, count, says))
    return found


def find(name: str) -> ModuleType:
    """The package of a model: a name in `TABLE`, an installed entry point, or, with a dot in it, an import path.

    The package has `KIND` ("acoustic" or "vocoder"), `Config`, `Model(config)` and `losses(model, batch, generator)`;
    one that is trained against discriminators has `Adversary(config)` too.

    Raises:
        ValueError: if there is no such model, or the package lacks one of its parts.
        ImportError: if torch is not installed.
    """
    wanted = name if "." in name else name.replace("-", "_")
    if wanted in TABLE:  # without the entry points of all that is installed, which take a tenth of a second
        return _checked(_imported(TABLE[wanted]), TABLE[wanted])
    others = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    path = wanted if "." in wanted else others.get(wanted) or others.get(name)
    if path is None:
        known = [*TABLE, *others]
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
        rest = [other for other in known if other not in near]
        raise ValueError(f"no model {name!r}; there are {', '.join(near + rest)}. "
                         "Your own is asked for by its import path: my_models.my_vocoder")
    return _checked(_imported(path), path)


def _imported(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError("models need torch: pip install 'featstore[zoo]'") from error
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            raise ValueError(f"no module {error.name!r} can be imported from here (asked for {path}); install it or "
                             "name its folder in PYTHONPATH") from None
        raise


def _checked(package: ModuleType, path: str) -> ModuleType:
    missing = [part for part in PARTS if not hasattr(package, part)]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: the package of a model has {', '.join(PARTS)}")
    if package.KIND not in KINDS:
        raise ValueError(f"{path}: KIND is {package.KIND!r}, expected one of {', '.join(KINDS)}")
    return package
