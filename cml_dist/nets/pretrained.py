"""Pre-trained weights of timm's models: where they are, and what images they were trained on.

``model.pretrained`` is true, a weight file, a folder, a timm name with its tag, or a hub name. timm is imported where
one of them is looked for: it takes a second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cml_dist.errors import ConfigError, ModelError

HUB = ("hf-hub:", "hf_hub:")
CONFIG = "config.json"
SAVED = ("model.safetensors", "pytorch_model.bin")
"""Weight files of a hub's repository, of what timm saves, and of an export; the safe one first."""

OTHER_HEAD_OR_SIZE = {"num_classes", "in_chans", "img_size", "global_pool", "dynamic_img_size", "strict_img_size"}
"""Of ``model_args`` in a saved ``config.json``: images and classes are the run's own."""


@dataclass(frozen=True)
class Weights:
    """Weights that were found, and are not read yet.

    Attributes:
        called: in messages.
        config: timm's ``PretrainedCfg`` of them: mean, std, size and interpolation of their images.
        file: gives the weight file, and fetches it first where it is not here; None: timm itself loads them.
    """

    called: str
    config: Any
    file: Callable[[], Path] | None


def find_weights(backbone: str, pretrained: bool | str) -> Weights:
    """The weights that ``model.pretrained`` means for a timm ``model.backbone``.

    Of a hub's repository its ``config.json`` is fetched, where the hub's cache does not have it.

    Raises:
        ConfigError: they are another model's, or a folder holds none; ModelError: the hub cannot be asked.
    """
    import timm

    if pretrained is True:
        return _published(backbone)
    if os.path.isdir(pretrained):
        return _in_folder(Path(pretrained), backbone)
    if pretrained.startswith(HUB):
        repository = pretrained.partition(":")[2]
        said = json.loads(_from_hub(repository, (CONFIG,)).read_text(encoding="utf-8"))
        return Weights(pretrained, _as_saved(said, pretrained, backbone), lambda: _from_hub(repository, SAVED))
    if not os.path.exists(pretrained) and timm.is_model(pretrained.partition(".")[0]):
        _check_same(pretrained, pretrained.partition(".")[0], backbone)
        return _published(pretrained)
    return Weights(f"weight file {pretrained}", _known(backbone), lambda: Path(pretrained))


def reason(error: Exception) -> str:
    """Its words, shortened."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def _known(name: str) -> Any:
    import timm

    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # a tag that it does not know
        return None


def _published(name: str) -> Weights:
    import timm

    config, called = _known(name), f"the published weights of {name}"
    if config is None and "." in name:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        remedy = f"use one of {', '.join(tags)}" if tags else "set model.pretrained to a weight file or false"
        raise ConfigError(f"timm knows no weights {name}, and there is no such file", remedy)
    # Foreign formats and plain addresses are timm's to read, which looks into its cache first.
    if config is None or not config.hf_hub_id or config.custom_load:
        return Weights(called, config, None)
    files = (config.hf_hub_filename,) if config.hf_hub_filename else SAVED
    return Weights(called, config, lambda: _from_hub(config.hf_hub_id, files))


def _in_folder(folder: Path, backbone: str) -> Weights:
    """Of a folder that a hub, timm or an export made, or of a run that holds one."""
    if (folder / "export" / CONFIG).is_file():
        folder = folder / "export"
    file, saved = next((folder / name for name in SAVED if (folder / name).is_file()), None), folder / CONFIG
    if file is None or not saved.is_file():
        missing = f"none of {', '.join(SAVED)}" if file is None else f"no {CONFIG} that says of what model they are"
        raise ConfigError(
            f"model.pretrained is the folder {folder}, but it has {missing}",
            "give the folder that a hub, timm or cml-dist export wrote, or a weight file itself",
        )
    try:
        said = json.loads(saved.read_text(encoding="utf-8"))
        return Weights(str(folder), _as_saved(said, str(folder), backbone), lambda: file)
    except (OSError, LookupError, TypeError, ValueError) as error:
        what = f"{saved} says nothing that can be used ({type(error).__name__}: {reason(error)})"
        raise ConfigError(what, "write that folder again, or give a weight file itself") from error


def _as_saved(said: Mapping[str, Any], called: str, backbone: str) -> Any:
    """What a ``config.json`` of timm's says."""
    from timm.models import PretrainedCfg

    if "architecture" not in said:
        raise ConfigError(f"the config.json of {called} names no timm model", "give weights that timm saved")
    _check_same(called, said["architecture"], backbone)
    changed = [a for a in said.get("model_args") or {} if a not in OTHER_HEAD_OR_SIZE and not a.startswith("drop")]
    if changed:
        raise ConfigError(
            f"{called} is a {backbone} that was built with {', '.join(changed)}, which cannot be repeated here",
            "give weights of the model as timm builds it by its name",
        )
    own, fields = said.get("pretrained_cfg", said), {field.name for field in dataclasses.fields(PretrainedCfg)}
    return PretrainedCfg(**{key: value for key, value in own.items() if key in fields})


def _check_same(called: str, architecture: str, backbone: str) -> None:
    theirs, ours = (name.partition(".")[0] for name in (architecture, backbone))
    if theirs != ours:
        raise ConfigError(
            f"model.pretrained is {called}, weights of {theirs}, but model.backbone is {backbone}",
            f"set model.backbone={theirs}",
        )


def _from_hub(name: str, files: Sequence[str]) -> Path:
    """The first of ``files`` that ``ORG/NAME[@REVISION]`` has; the network is not asked where the cache has one."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    revision = revision or None
    try:
        for file in files:
            if isinstance(cached := try_to_load_from_cache(repository, file, revision=revision), str):
                return Path(cached)
        for file in files[:-1]:
            try:
                return Path(hf_hub_download(repository, file, revision=revision))
            except LocalEntryNotFoundError:  # the network gave no answer, and would give none to the next question
                raise
            except EntryNotFoundError:
                pass
        return Path(hf_hub_download(repository, files[-1], revision=revision))
    except Exception as error:  # its clients raise of every kind
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise ModelError(
            f"{files[0]} of {name} is not in the hub's cache and cannot be had: {reason(cause or error)}",
            f"check name and network, or run `hf download {repository} --local-dir FOLDER` where there is one, and set "
            "model.pretrained to that folder",
        ) from error
