"""What a run's network was trained to read: it is the model's, whatever data it is tested on."""

from __future__ import annotations

import json
from collections.abc import Callable

from cml_dist.config.methods import has_fixed_ways
from cml_dist.config.schema import RunConfig
from cml_dist.data.base import ModelInputs
from cml_dist.run.checkpoint import newest_state
from cml_dist.run.folder import RunFolder


def trained_inputs(config: RunConfig, warn: Callable[[str], None]) -> ModelInputs | None:
    """What the network in ``run.dir`` reads, from its checkpoints, or its sessions where an earlier version trained it.

    None where neither says it; ``warn`` is told where that matters.
    """
    folder = RunFolder(config.run.dir)
    recorded, then = newest_state(folder.checkpoints).get("inputs"), folder.read_config().domain
    try:
        if recorded is None:
            *_, last = folder.sessions_file.read_text(encoding="utf-8").splitlines()
            recorded = {"output_dim": getattr(then, "ways", None), **json.loads(last)["data"]}
        found = ModelInputs.model_validate(recorded)
    except (OSError, LookupError, TypeError, ValueError):
        root = getattr(config.domain, "root", None)
        if root != getattr(then, "root", None):
            warn(
                f"{folder.path} does not say what images its network was trained on: the mean and std of {root} are "
                "used; set domain.mean and domain.std where you know better"
            )
        return None
    return found if has_fixed_ways(config) else found.model_copy(update={"output_dim": None})
