"""Networks. Where this package has been imported, timm has ``resnet12`` and ``resnet12_wide`` too."""

import sys
from importlib import import_module, machinery
from types import SimpleNamespace


def _find_timm(name: str, *_: object) -> machinery.ModuleSpec | None:
    """Has them registered when timm is imported: it takes seconds, for which runs of other networks need not wait."""
    spec = machinery.PathFinder.find_spec(name) if name == "timm" else None
    if spec and spec.loader:
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), import_module("cml_dist.nets.resnet12"))
    return spec


if "timm" in sys.modules:
    import_module("cml_dist.nets.resnet12")
else:
    sys.meta_path.insert(0, SimpleNamespace(find_spec=_find_timm))
