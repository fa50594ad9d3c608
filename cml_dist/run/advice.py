"""What to do after NaN: only what has an effect, and is not done yet."""

from __future__ import annotations

from cml_dist.config.methods import adapting_rates
from cml_dist.config.schema import RunConfig
from cml_dist.run.folder import RunFolder, steps_in


def after_nan(config: RunConfig, step: int, skipped: int, folder: RunFolder) -> str:
    """What can help a run that had a NaN or inf meta-gradient in ``skipped`` of ``step`` meta-steps: another run."""
    rates = [f"method.{name}" for name in adapting_rates(config)]
    remedy = "train in another run.dir with a lower "
    if skipped < step:  # else no outer step was ever taken, and what is NaN cannot be clipped
        remedy += " or ".join([*rates, "optim.lr"]) + ("" if config.optim.clip_norm else ", or with optim.clip_norm")
    elif rates:
        remedy += " or ".join(rates)
    else:
        remedy = "look for NaN and inf in the inputs and the initial weights, and train in another run.dir"
    saved = steps_in(folder.checkpoints)
    return remedy + (f"; the checkpoint of step {saved[-1]} stays in {folder.checkpoints}" if saved else "")
