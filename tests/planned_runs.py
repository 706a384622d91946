"""What runs leave behind, without training them."""

import math

from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.owner import code_fingerprint, owner


def finish(run: PlannedRun, loss: float) -> None:
    """Marks the run done, as it does itself; one of an infinite loss has diverged."""
    run.directory.path.mkdir(parents=True, exist_ok=True)
    step = run.config.train.num_steps
    outcome = {"outcome": "completed" if math.isfinite(loss) else "diverged", "step": step, "seconds": 1.0}
    metric = {"minival_loss": loss} if math.isfinite(loss) else {}
    run.directory.write_done(outcome | metric | owner(run.config) | {"code": code_fingerprint()})
