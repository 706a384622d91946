"""What the theory of depthmup.models.limit predicts of a study, and which studies it is about."""

from collections.abc import Iterable
from dataclasses import replace

from depthmup.launch.config import StudyFile, show_label
from depthmup.models.config import ConvResNetConfig, Size
from depthmup.models.limit.drift import has_limit, predict_drift
from depthmup.models.limit.network import ActivationName
from depthmup.models.optimizer_config import RoleRates
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig

COVERED = "a conv_resnet with norm none and convs_per_branch 1, trained by sgd without nesterov or role_lr"


def explain_not_covered(run: RunConfig) -> str | None:
    """What the theory has no formula for, in a few words; None for a network that it is about."""
    model = run.model
    if not isinstance(model, ConvResNetConfig):
        return f"model.family {model.family}"
    if model.norm != "none":
        return f"model.norm {model.norm}"
    if model.convs_per_branch != 1:
        return f"model.convs_per_branch {model.convs_per_branch}"
    if run.optimizer.name != "sgd":
        return f"optimizer.name {run.optimizer.name}"
    if run.optimizer.role_lr != RoleRates():
        return "optimizer.role_lr"
    return "optimizer.nesterov" if run.optimizer.nesterov else None


def find_activation(run: RunConfig) -> ActivationName:
    """Of a network that is covered."""
    assert isinstance(run.model, ConvResNetConfig)
    return run.model.activation


def list_drifts(
    parameterization: ParameterizationConfig, base: Size, depths: Iterable[int], activation: ActivationName = "relu"
) -> dict[int, float]:
    """Octaves by which the best rate moves at each of `depths` but the base's, because depth is finite; {} where the
    rules have no limit."""
    resolved = parameterization.resolve()
    if not has_limit(resolved):
        return {}
    sizes = (Size(width=base.width, depth=depth) for depth in sorted(set(depths)) if depth != base.depth)
    return {size.depth: predict_drift(resolved, base, size, activation) for size in sizes}


def describe_drift(
    parameterization: ParameterizationConfig, base: Size, depths: Iterable[int], activation: ActivationName = "relu"
) -> str | None:
    """What finite depth does to the best rate, and what the paper's own beta would make of it; None where nothing is
    predicted: no depth but the base's, or no limit."""
    given = list(depths)
    found = list_drifts(parameterization, base, given, activation)
    if not found:
        return None

    def octaves(of: dict[int, float]) -> str:
        return ", ".join(f"{drift:+.2f}" for drift in of.values())

    at, alpha = ", ".join(map(str, found)), parameterization.resolve().alpha
    limit = predict_drift(parameterization.resolve(), base, None, activation)
    said = (
        f"{show_label(parameterization)}: in theory the largest stable rate at the start drifts by {octaves(found)} "
        f"octaves at depth {at} ({limit:+.2f} in the limit)"
    )
    absolute = base.depth**-alpha  # beta of the paper's form
    if parameterization.beta > 1.01 * absolute:
        better = replace(parameterization, beta=absolute)
        brought = octaves(list_drifts(better, base, given, activation))
        said += f"; beta {absolute:.3g} = {base.depth}^-{alpha:g} brings it to {brought}"
    return said


def predict_drifts(file: StudyFile) -> dict[str, dict[int, float]]:
    """By parameterization and depth, in octaves; {} for a study that is not of the learning rate, or not covered."""
    if file.study.hyperparameter != "optimizer.lr" or explain_not_covered(file):
        return {}
    depths, activation = [size.depth for size in file.study.sizes], find_activation(file)
    return {
        show_label(p): list_drifts(p, file.model.base_size, depths, activation) for p in file.study.parameterizations
    }


def describe_drifts(file: StudyFile) -> list[str]:
    """The same, as a sentence for each parameterization that has a prediction."""
    if not predict_drifts(file):
        return []
    depths, activation = [size.depth for size in file.study.sizes], find_activation(file)
    found = (describe_drift(p, file.model.base_size, depths, activation) for p in file.study.parameterizations)
    return [sentence for sentence in found if sentence]
