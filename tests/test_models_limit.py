"""The theory's limit: the solvers give the values that were derived for them, agree where they overlap, and finite
networks under this package's rules approach them; under a broken rule they do not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from depthmup.models import OptimizerConfig, ParameterizationConfig, Role, Size
from depthmup.models import parameterization as rules
from depthmup.models.errors import ModelError
from depthmup.models.limit.activations import ACTIVATIONS
from depthmup.models.limit.drift import compute_kernel_at, compute_kernel_in_limit, predict_drift
from depthmup.models.limit.finite import build_scaled_network, train_finite
from depthmup.models.limit.kernels import compute_finite_depth_kernel, compute_infinite_depth_kernel, find_largest_rate
from depthmup.models.limit.linear import train_linear
from depthmup.models.limit.network import ActivationName, Training, Trajectory, build_paper_network, extrapolate_depth
from depthmup.models.limit.rich import train_rich
from depthmup.models.parameterization import Scale

ONE = np.ones((1, 1))


def one_sample(steps: int, rate: float = 0.05) -> Training:
    return Training(ONE, np.ones(1), rate, steps)


def few_samples(samples: int = 4, steps: int = 6, rate: float = 0.3, momentum: float = 0.0) -> Training:
    """Random inputs of norm 1, random signs to learn."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((samples, 20))
    inputs /= np.sqrt((inputs**2).mean(axis=1, keepdims=True))
    return Training(inputs @ inputs.T / 20, rng.choice([-1.0, 1.0], samples), rate, steps, momentum)


# ---------------------------------------------------------------- the exact linear network


LINEAR_OUTPUTS = [  # gamma0, outputs at steps 1, 2, ...
    (1.0, [0.3879, 0.6446, 0.8140, 0.9119, 0.9611]),
    (0.1, [0.3879, 0.6256, 0.7711]),
    (2.0, [0.3879, 0.7050, 0.9368]),
]


@pytest.mark.parametrize(("gamma0", "outputs"), LINEAR_OUTPUTS)
def test_outputs_of_the_linear_network(gamma0: float, outputs: list[float]) -> None:
    found = train_linear(build_paper_network("linear", 16, gamma0=gamma0), one_sample(len(outputs)))
    assert found.outputs[1:, 0].round(4).tolist() == outputs


def test_feature_kernel_of_the_linear_network() -> None:
    assert f"{train_linear(build_paper_network('linear', 16), one_sample(9)).forward[-1, 9, 9]:.3f}" == "3.950"


def test_without_responses_the_linear_network_is_another() -> None:
    found = train_linear(build_paper_network("linear", 16), one_sample(5), responses=False).outputs[1:, 0]
    assert found.round(4).tolist() == [0.2638, 0.4671, 0.6280, 0.7511, 0.8401]


def one_step(depth: int, input_rate: float) -> Trajectory:
    """a = kappa Delta = 0.5."""
    return train_linear(build_paper_network("linear", depth, gamma0=10.0, input_rate=input_rate), one_sample(1))


def test_one_step_of_the_linear_network_at_finite_depth() -> None:
    assert [f"{one_step(depth, 1.0).forward[-1, 1, 1]:.2f}" for depth in (16, 64)] == ["16.03", "17.98"]


@pytest.mark.parametrize("input_rate", [1.0, 0.0])
def test_one_step_of_the_linear_network_in_the_limit(input_rate: float) -> None:
    """H_1(tau) = e^tau (1 + e a^2 q(tau)) and f_1 = (2 + c) e eta0 Delta."""
    runs = {depth: one_step(depth, input_rate) for depth in (16, 32, 64)}
    for tau in (0.25, 0.5, 1.0):
        kernel = extrapolate_depth({depth: run.forward[int(tau * depth), 1, 1] for depth, run in runs.items()}, 2)
        polynomial = input_rate * (1 + 4 * tau + 2 * tau**2) + tau**2 + 2 / 3 * tau**3
        assert kernel == pytest.approx(math.exp(tau) * (1 + math.e * 0.25 * polynomial), rel=1e-3)
    output = extrapolate_depth({depth: run.outputs[1, 0] for depth, run in runs.items()}, 2)
    assert output == pytest.approx((2 + input_rate) * math.e * 0.05, rel=1e-4)


def test_one_step_of_the_linear_network_is_the_stated_number_in_the_limit() -> None:
    kernels = {depth: one_step(depth, 1.0).forward[-1, 1, 1] for depth in (8, 16, 32, 64)}
    assert f"{extrapolate_depth(kernels, 3):.2f}" == "18.73"


def test_tangent_kernel_of_the_linear_network() -> None:
    for depth in (4, 16):
        found = compute_finite_depth_kernel(build_paper_network("linear", depth), ONE).total[0, 0]
        assert found == pytest.approx(2 * (1 + 1 / depth) ** depth + (1 + 1 / depth) ** (depth - 1))
    limit = compute_infinite_depth_kernel("linear", ONE)
    assert [limit.readout[0, 0], limit.hidden[0, 0], limit.input[0, 0]] == pytest.approx([math.e] * 3, rel=1e-6)


def test_kernels_at_the_start_of_the_linear_network() -> None:
    """H(tau) = e^tau and G(tau) = e^(1 - tau) in the limit."""
    runs = {depth: train_linear(build_paper_network("linear", depth), one_sample(0)) for depth in (16, 32, 64)}
    middle = {depth: (run.forward[depth // 2, 0, 0], run.backward[depth // 2, 0, 0]) for depth, run in runs.items()}
    assert extrapolate_depth({d: np.array(v) for d, v in middle.items()}, 2) == pytest.approx(math.exp(0.5), rel=1e-4)


# ---------------------------------------------------------------- the lazy limit


@pytest.mark.parametrize(
    ("cosine", "terms", "total"),
    [
        (1.0, ["0.82436", "0.41218", "0.82436"], "2.06090"),
        (0.5, ["0.53005", "0.16364", "0.24032"], "0.93401"),
        (0.0, None, "0.39493"),
    ],
)
def test_tangent_kernel_of_relu_networks_in_the_limit(cosine: float, terms: list[str] | None, total: str) -> None:
    found = compute_infinite_depth_kernel("relu", np.array([[1.0, cosine], [cosine, 1.0]]))
    assert f"{found.total[0, 1]:.5f}" == total
    if terms:
        assert [f"{term[0, 1]:.5f}" for term in (found.readout, found.hidden, found.input)] == terms


def test_tangent_kernel_of_relu_networks_at_finite_depth() -> None:
    found = {
        depth: compute_finite_depth_kernel(build_paper_network("relu", depth), ONE).total[0, 0]
        for depth in (4, 8, 16, 32)
    }
    assert [f"{kernel:.5f}" for kernel in found.values()] == ["1.95776", "2.00633", "2.03279", "2.04663"]
    s, depth = 3.0, 6
    assert compute_finite_depth_kernel(build_paper_network("relu", depth, beta=s**0.5), ONE).total[
        0, 0
    ] == pytest.approx((1 + s / 2 / depth) ** depth + s / 4 * (1 + s / 2 / depth) ** (depth - 1))


@pytest.mark.parametrize(("cosine", "coefficient"), [(1.0, -0.463), (0.5, -0.187)])
def test_finite_depth_error_falls_as_one_over_depth(cosine: float, coefficient: float) -> None:
    inputs = np.array([[1.0, cosine], [cosine, 1.0]])
    limit = compute_infinite_depth_kernel("relu", inputs).total[0, 1]
    error = compute_finite_depth_kernel(build_paper_network("relu", 2000), inputs).total[0, 1] - limit
    assert 2000 * error == pytest.approx(coefficient, abs=1e-3)


def brute_force(name: str, rho: float, first: float, second: float) -> tuple[float, float]:
    """(Phi, Phidot) by a sum over a fine grid of two independent normals."""
    z = np.linspace(-8, 8, 1601)
    weights = np.exp(-(z**2) / 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    u, v = math.sqrt(first) * z[:, None], math.sqrt(second) * (rho * z[:, None] + math.sqrt(1 - rho**2) * z[None])
    activation = ACTIVATIONS[name]
    return tuple(float((weights * of(u) * of(v)).sum()) for of in (activation.value, activation.slope))


@pytest.mark.parametrize("name", ["relu", "erf", "tanh", "linear"])
@pytest.mark.parametrize("rho", [-0.9, 0.3, 0.99])
def test_averages_are_those_of_gaussian_pairs(name: str, rho: float) -> None:
    norms = np.array([0.5, 3.0])
    found = ACTIVATIONS[name].averages(np.array([rho]), norms, np.array([0]), np.array([1]))
    tolerance = 5e-3 if name == "relu" else 1e-6  # a jump on a grid
    assert [float(each[0]) for each in found] == pytest.approx(brute_force(name, rho, 0.5, 3.0), abs=tolerance)


def test_depth_ode_is_the_limit_of_the_recursion_for_every_activation() -> None:
    inputs = few_samples().input_kernel
    for name in ("relu", "erf", "tanh", "linear"):
        depths = {
            depth: compute_finite_depth_kernel(build_paper_network(name, depth), inputs).total
            for depth in (50, 100, 200)
        }
        assert extrapolate_depth(depths, 2) == pytest.approx(
            compute_infinite_depth_kernel(name, inputs).total, rel=1e-5
        )


# ---------------------------------------------------------------- the rich limit, and where solvers overlap


def test_monte_carlo_solver_of_the_linear_network_is_the_exact_one() -> None:
    training = few_samples(samples=2, rate=0.06, momentum=0.5)
    network = build_paper_network("linear", 8, gamma0=1.5)
    exact, found = train_linear(network, training), train_rich(network, training, sites=8000)
    assert found.outputs == pytest.approx(exact.outputs, abs=0.02)
    assert found.forward[-1] == pytest.approx(exact.forward[-1], rel=0.05, abs=0.1)
    assert found.backward[0] == pytest.approx(exact.backward[0], rel=0.05, abs=0.1)


def lazy_outputs(kernel: np.ndarray, training: Training) -> np.ndarray:
    """(T + 1, P): f_t = -rate NTK sum_s memory[t, s] (f_s - y) / P, from f_0 = 0, where the kernel stays as it is."""
    memory, outputs = training.memory(), np.zeros((training.steps + 1, training.samples))
    for step in range(1, training.steps + 1):
        errors = (training.targets - outputs[:step]) / training.samples
        outputs[step] = training.rate * kernel @ (memory[step, :step] @ errors)
    return outputs


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_rich_limit_at_small_gamma_is_the_lazy_one(name: str) -> None:
    training = few_samples(momentum=0.5)
    network = build_paper_network(name, 8, gamma0=1e-3)
    lazy = lazy_outputs(compute_finite_depth_kernel(network, training.input_kernel).total, training)
    assert train_rich(network, training, sites=8000).outputs == pytest.approx(lazy, abs=0.025)
    rich = train_rich(replace(network, gamma=2.0), training, sites=8000).outputs
    assert np.abs(rich - lazy).max() > 0.1


def test_linear_network_at_small_gamma_is_the_lazy_one() -> None:
    training = few_samples(rate=0.1, momentum=0.5)
    network = build_paper_network("linear", 8, gamma0=1e-3)
    lazy = lazy_outputs(compute_finite_depth_kernel(network, training.input_kernel).total, training)
    assert train_linear(network, training).outputs == pytest.approx(lazy, abs=1e-5)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_responses_matter_to_the_rich_limit(name: str) -> None:
    training, network = few_samples(), build_paper_network(name, 8, gamma0=3.0 if name == "tanh" else 1.5)
    with_them, halved, without = (
        train_rich(network, training, sites, responses=on).outputs
        for sites, on in ((8000, True), (4000, True), (8000, False))
    )
    noise = np.abs(with_them - halved).max()
    assert np.abs(with_them - without).max() > 3 * noise


def test_rich_limit_starts_from_zero_exactly() -> None:
    assert np.abs(train_rich(build_paper_network("relu", 4), few_samples(steps=0), sites=400).outputs).max() < 1e-12


# ---------------------------------------------------------------- what is refused


def test_what_has_no_limit_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="gamma0 is 0, but must be above 0"):
        build_paper_network("relu", 4, gamma0=0.0)
    inputs = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    with pytest.raises(ModelError, match="inputs 0 and 2 are the same"):
        Training(inputs @ inputs.T / 2, np.ones(3), 0.1, 3)
    with pytest.raises(ModelError, match="an input is zero"):
        Training(np.diag([1.0, 0.0]), np.ones(2), 0.1, 3)
    for solver, name in ((train_linear, "linear"), (train_rich, "relu")):
        with pytest.raises(ModelError, match="past the edge of stability"):
            solver(build_paper_network(name, 4), one_sample(3, rate=2.0))
    with pytest.raises(ModelError, match="exact solver is of linear networks, not of relu"):
        train_linear(build_paper_network("relu", 4), one_sample(3))
    sp = ParameterizationConfig(name="sp").resolve()
    with pytest.raises(ModelError, match="sp with alpha 0 has no limit"):
        predict_drift(sp, Size(width=8, depth=3), None)


def test_the_largest_stable_rate_is_where_lazy_training_turns() -> None:
    for momentum in (0.0, 0.9):
        training = few_samples(steps=400, momentum=momentum)
        kernel = compute_finite_depth_kernel(build_paper_network("relu", 4), training.input_kernel).total
        edge = find_largest_rate(kernel, momentum)
        below, above = (lazy_outputs(kernel, replace(training, rate=share * edge)) for share in (0.98, 1.02))
        assert np.abs(below[-1] - training.targets).max() < 1
        assert np.abs(above[-1]).max() > 10


# ---------------------------------------------------------------- the rules of this package


@pytest.mark.parametrize(
    ("base_depth", "beta", "drifts"),
    [
        (3, 1.0, ["-0.27", "-0.44", "-0.53", "-0.63"]),
        (3, 3**-0.5, ["-0.05", "-0.07", "-0.08", "-0.10"]),
        (12, 1.0, ["-0.89", "-1.43", "-1.73", "-2.05"]),
        (12, 12**-0.5, ["-0.01", "-0.02", "-0.02", "-0.03"]),
    ],
)
def test_predicted_drift_over_depth(base_depth: int, beta: float, drifts: list[str]) -> None:
    p, base = ParameterizationConfig(beta=beta).resolve(), Size(width=16, depth=base_depth)
    sizes = [Size(width=16, depth=factor * base_depth) for factor in (2, 4, 8)]
    assert [f"{predict_drift(p, base, size):.2f}" for size in [*sizes, None]] == drifts


def test_width_moves_the_largest_rate_of_sp_alone() -> None:
    """Under sp the readout's and the branches' terms grow with width, here by 4, and the input's third does not."""
    base, wide = Size(width=16, depth=3), Size(width=64, depth=3)
    for name, drift in (("depth_mup", 0.0), ("mup", 0.0), ("completep", 0.0), ("sp", -math.log2(3))):
        found = predict_drift(ParameterizationConfig(name=name).resolve(), base, wide)
        assert found == pytest.approx(drift, abs=1e-9)


def test_kernel_over_depth_nears_the_limit_of_every_rule_that_has_one() -> None:
    base = Size(width=16, depth=3)
    for alpha in (0.5, 1.0):
        p = ParameterizationConfig(name="depth_mup", alpha=alpha, beta=0.7).resolve()
        limit = compute_kernel_in_limit(p, base, 24)
        assert compute_kernel_at(p, Size(width=64, depth=3000), base, 24) == pytest.approx(limit, rel=1e-3)


def tangent_kernel_of_network(
    p: ParameterizationConfig, size: Size, base: Size, inputs: torch.Tensor, activation: ActivationName
) -> np.ndarray:
    """By differentiating one network, every parameter at its learning rate factor."""
    scaled = build_scaled_network(p, size, base, inputs.shape[1], 0, activation)
    parameters = dict(scaled.network.named_parameters())
    roots = [math.sqrt(scaled.scale.factors(scaled.rules[name].role, "sgd").lr) for name in parameters]
    rows = []
    for output in scaled.network(inputs):
        gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True)
        rows.append(torch.cat([root * gradient.flatten() for root, gradient in zip(roots, gradients, strict=True)]))
    jacobian = torch.stack(rows).double().numpy()
    return jacobian @ jacobian.T


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", ["depth_mup", "completep", "mup", "sp"])
def test_tangent_kernel_of_a_wide_network_is_the_predicted_one(name: str, activation: ActivationName) -> None:
    """Under every preset, at a size that is not the base's, with beta and gamma0 of its own."""
    inputs = torch.nn.functional.normalize(torch.randn((3, 24), generator=torch.Generator().manual_seed(0))) * 24**0.5
    p, base, size = (
        ParameterizationConfig(name=name, beta=0.6, gamma0=2.0),
        Size(width=64, depth=2),
        Size(width=1024, depth=6),
    )
    found = tangent_kernel_of_network(p, size, base, inputs, activation)
    predicted = compute_kernel_at(p.resolve(), size, base, 24, (inputs @ inputs.T / 24).double().numpy(), activation)
    assert np.linalg.norm(found - predicted) < 0.1 * np.linalg.norm(predicted)


# ---------------------------------------------------------------- finite networks

BASE, LARGE, INPUTS = Size(width=8, depth=3), Size(width=256, depth=24), 16
P = ParameterizationConfig(name="depth_mup", beta=0.8)


def distance_to_limit(seeds: int, size: Size = LARGE, parameterization: ParameterizationConfig = P) -> float:
    """Of the mean outputs of trained networks to those of the infinitely wide network of that depth, in the paper's own
    form: no rule of this package has a part in it. Relative."""
    inputs = torch.nn.functional.normalize(torch.randn((4, INPUTS), generator=torch.Generator().manual_seed(0)))
    inputs, targets, steps, lr = inputs * INPUTS**0.5, torch.tensor([1.0, -1.0, 1.0, -1.0]), 6, 0.04
    optimizer = OptimizerConfig(name="sgd", lr=lr, momentum=0.5)
    runs = [
        train_finite(parameterization, size, BASE, inputs, targets, optimizer, steps, seed) for seed in range(seeds)
    ]
    network = build_paper_network(
        "relu", size.depth, 0.8 * BASE.depth**0.5, gamma0=BASE.width**-0.5, input_rate=INPUTS / BASE.width
    )
    kernel = (inputs @ inputs.T / INPUTS).double().numpy()
    training = Training(kernel, targets.double().numpy(), lr * BASE.width, steps, momentum=0.5)
    limit = train_rich(network, training, sites=4000).outputs
    return float(np.linalg.norm(np.mean([run.outputs for run in runs], axis=0) - limit) / np.linalg.norm(limit))


def scale_learning_rate(role: Role, factor: rules.Formula) -> None:
    row = rules.TABLE[role]
    rules.TABLE[role] = replace(row, lr_sgd=lambda N, L, a: row.lr_sgd(N, L, a) * factor(N, L, a))


FAULTS = {
    "rate of the readout": lambda: scale_learning_rate(Role.READOUT, lambda N, L, a: N**-0.5),
    "rate of the input": lambda: scale_learning_rate(Role.INPUT, lambda N, L, a: N**0.5),
    "rate of in-block weights, depth": lambda: scale_learning_rate(Role.BRANCH_HIDDEN, lambda N, L, a: L**0.5),
    "rate of in-block weights, width": lambda: scale_learning_rate(Role.BRANCH_HIDDEN, lambda N, L, a: N**-0.5),
    "branch exponent": lambda: setattr(Scale, "branch_multiplier", lambda self: 0.8 * self.depth_ratio**-0.25),
    "branch exponent 1": lambda: setattr(Scale, "branch_multiplier", lambda self: 0.8 / self.depth_ratio),
    "readout multiplier": lambda: setattr(Scale, "readout_multiplier", lambda self: self.width_ratio**-0.5),
}


def test_finite_networks_are_near_the_limit() -> None:
    near, far = distance_to_limit(seeds=12), distance_to_limit(seeds=12, size=Size(width=32, depth=24))
    assert near < 0.06
    assert far > 2 * near


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_makes_finite_networks_miss_the_limit(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("branch_multiplier", "readout_multiplier"):
        monkeypatch.setattr(Scale, name, getattr(Scale, name))  # restored afterwards
    monkeypatch.setattr(rules, "TABLE", rules.TABLE.copy())
    FAULTS[fault]()
    assert not distance_to_limit(seeds=6) < 0.1  # it may be no number
