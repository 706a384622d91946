"""The axes of scale along which a study's sizes may differ."""

from collections.abc import Mapping, Sequence
from itertools import product

from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig

TRAINING_AXES = {"batch": "global_batch_size", "samples": "samples"}  # axis -> key of train
MODEL_AXES = ("width", "depth", "num_experts")  # keys of model
AXES = (*MODEL_AXES, *TRAINING_AXES)


def find_axes_misfit(
    varied: Mapping[str, set[int]],
    base: RunConfig,
    parameterizations: Sequence[ParameterizationConfig],
    hyperparameter: str,
) -> str | None:
    """Why the sizes' batch and samples, or the exponents for them, do not go together, and what would. `varied`: the
    values on those of TRAINING_AXES that the study has; `hyperparameter`: what is swept."""
    for axis in varied:
        if hyperparameter in (f"train.{TRAINING_AXES[axis]}", f"optimizer.{axis}_ratio"):
            return f"study.hyperparameter {hyperparameter} is the {axis} of study.sizes, too: sweep another"
    batches = varied.get("batch", set())
    if getattr(base.model, "norm", None) == "batch" and len(batches) > 1 and base.train.batch_norm_images is None:
        return (
            "study.sizes differ in batch, and each BatchNorm takes its statistics over the whole batch: another "
            f"network at every size. State train.batch_norm_images={min(batches)}"
        )
    for axis, parameterization in product(TRAINING_AXES, parameterizations):
        stands = len(varied.get(axis, ())) < 2 and getattr(base.optimizer, f"{axis}_ratio") == 1
        if getattr(parameterization, f"{axis}_lr") is not None and stands:
            return (
                f"study.parameterizations: {axis}_lr would do nothing: no two of study.sizes differ in {axis}; leave "
                f"it out, or give a size another {axis}"
            )
    return None


def find_ladder_misfit(
    horizons: set[int], base: RunConfig, parameterizations: Sequence[ParameterizationConfig], hyperparameter: str
) -> str | None:
    """Why runs of these `horizons` (samples) cannot share a trunk, and what to do."""
    if len(horizons) < 2:
        return "study.ladder would do nothing: no two of study.sizes differ in samples; give a size another samples"
    if base.schedule.name != "wsd":
        return f"study.ladder branches where wsd begins to decay, and schedule.name is {base.schedule.name}: use wsd"
    depends = {"optimizer.tau_ema", "schedule.warmup"} & {hyperparameter}
    if base.optimizer.tau_ema is not None:
        depends.add("optimizer.tau_ema")
    if any(parameterization.samples_lr is not None for parameterization in parameterizations):
        depends.add("samples_lr")
    if depends:
        return (
            f"study.ladder: {', '.join(sorted(depends))} would make another run of every horizon before it decays: "
            "leave it out, or leave out study.ladder"
        )
    return None
