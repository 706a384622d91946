"""The init of a base network, read off the weights that its builder drew."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from depthmup.models.errors import ModelError
from depthmup.models.family import ONES, ZEROS, Init

STANDARD_ERRORS = 4.0  # as far as a measured standard deviation may lie from a known init's
MEANS_ERRORS = 6.0  # as far as the mean may lie from zero, in standard errors
GAINS = (3**-0.5, 1.0, 2**0.5)  # on 1/sqrt(fan): torch's default for linear and conv layers, Glorot's, He's for ReLU
DEVIATIONS = (0.02, 0.01, 1e-6, 1.0)  # timm's for linear layers, classifiers, class tokens; torch's for embeddings


def compute_deviation(tensor: Tensor) -> float:
    """Root mean square of the entries, whose mean is taken to be zero."""
    return float(tensor.double().square().mean().sqrt())


def is_uniform(tensor: Tensor) -> bool:
    """Of a uniform distribution nothing lies beyond sqrt(3) standard deviations, of a normal one 8 %. Fewer than 30
    numbers do not tell: then it is taken to be normal."""
    return tensor.numel() >= 30 and float(tensor.abs().max()) <= 1.05 * math.sqrt(3) * compute_deviation(tensor)


def list_known_inits(uniform: bool, fans: bool) -> Iterator[Init]:
    """Inits in common use; with `fans`, those that go by the fan of a weight (out, in, *kernel) as well."""
    yield from (Init("uniform" if uniform else "normal", std) for std in DEVIATIONS)
    if fans:
        yield from (Init("uniform_fan_in" if uniform else "normal_fan_in", gain) for gain in GAINS)
        yield from (Init("normal_fan_out", gain) for gain in GAINS if not uniform)


def list_glorot_inits(uniform: bool) -> Iterator[Init]:
    """They go by the mean of both fans, and lie near others where the two are alike: they count where no other fits."""
    yield from (Init("uniform_fan_avg" if uniform else "normal_fan_avg", gain) for gain in GAINS)


def fit(law: Init, tensors: Sequence[Tensor]) -> float:
    """The gain with which `law` explains the tensors' deviations, in the geometric mean."""
    logs = [math.log(compute_deviation(tensor) / law.base_std(tuple(tensor.shape))) for tensor in tensors]
    return law.scale * math.exp(sum(logs) / len(logs))


def refuse_other_draws(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises ModelError for tensors that are drawn about another mean than zero, which no `Init` is."""
    count = sum(map(Tensor.numel, tensors))
    mean = sum(float(tensor.double().sum()) for tensor in tensors) / count
    std = math.sqrt(sum(float((tensor.double() - mean).square().sum()) for tensor in tensors) / count)
    if abs(mean) > MEANS_ERRORS * std / math.sqrt(count):
        raise ModelError(
            f"{name} starts at {mean:.3g} on average, with a deviation of {std:.3g}, and all initial weights are drawn "
            "anew, from a constant or about zero: start it there, and add the mean in the forward pass"
        )


def refuse_structured(base: nn.Module, deep: nn.Module) -> None:
    """Raises ModelError for a parameter that starts from the same numbers in two networks of other seeds, where others
    do not: they were computed, as an identity is, and would be lost."""
    of_deep = dict(deep.named_parameters())
    drawn = {
        name: torch.equal(parameter, of_deep[name])
        for name, parameter in base.named_parameters()
        if name in of_deep and (parameter != parameter.flatten()[0]).any()
    }
    same = [name for name, equal in drawn.items() if equal]
    if same and len(same) < len(drawn):  # of a builder that sets a seed of its own all are the same
        raise ModelError(
            f"{same[0]} starts from the same numbers whatever the seed, and all initial weights are drawn anew, so "
            "that they would be lost: make it a buffer (register_buffer), or add them in the forward pass to a "
            "parameter that starts at zero"
        )


def measure_init(name: str, base: Sequence[Tensor], deeper: Sequence[Tensor], fans: bool) -> Init:
    """The init of parameters that are drawn alike, one tensor a block of the base and of a deeper network: constant,
    uniform or normal, about zero.

    fans: the tensors are weights (out, in, *kernel). One of `list_known_inits` where it explains the standard deviation
    of every tensor within noise; otherwise, as where an init depends on the depth, the one measured in the base. Raises
    ModelError for another mean, and where the base's tensors are then of several shapes.
    """
    tensors = [tensor.detach() for tensor in (*base, *deeper)]
    constants = {float(tensor.flatten()[0]) for tensor in tensors if bool((tensor == tensor.flatten()[0]).all())}
    if len(constants) == 1 and all(bool((tensor == tensor.flatten()[0]).all()) for tensor in tensors):
        (value,) = constants
        return {0.0: ZEROS, 1.0: ONES}.get(value, Init("constant", value))
    refuse_other_draws(name, tensors)
    largest = max(tensors, key=Tensor.numel)
    uniform = is_uniform(largest)
    # relative standard error of a measured deviation: sqrt((kurtosis - 1) / 4 n), kurtosis 1.8 or 3
    error = [math.sqrt((0.8 if uniform else 2.0) / (4 * tensor.numel())) for tensor in tensors]

    def misfit(known: Init) -> float:
        """In standard errors, of the tensor that it explains least; of logarithms, as few numbers have wide errors."""
        expected = (known.base_std(tuple(tensor.shape)) for tensor in tensors)
        found = zip(map(compute_deviation, tensors), expected, error, strict=True)
        return max(abs(math.log(measured / std)) / each if measured else math.inf for measured, std, each in found)

    for known in (list_known_inits(uniform, fans), list_glorot_inits(uniform) if fans else ()):
        best = min(known, key=misfit, default=None)
        if best and misfit(best) <= STANDARD_ERRORS:
            return best
    if len({tensor.shape for tensor in base}) > 1 and fans:
        laws = [
            Init(law.kind, fit(law, tensors)) for law in list_known_inits(uniform, fans)
        ]  # with a gain of their own
        best = min(laws, key=misfit)
        if misfit(best) <= STANDARD_ERRORS:
            return best
        raise ModelError(
            f"{name}: the weights of its blocks differ in shape, and their init is none in common use: write its "
            "ParameterRule by hand, see docs/your-model.md"
        )
    total = sum(tensor.numel() * compute_deviation(tensor) ** 2 for tensor in base) / sum(map(Tensor.numel, base))
    return Init("uniform" if uniform else "normal", math.sqrt(total))
