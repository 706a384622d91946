"""How long the theory's solvers take, in seconds of CPU, and whether the lazy one agrees with google/neural-tangents.

OMP_NUM_THREADS=1 python -m benchmarks.limit     # the solvers
python -m benchmarks.limit --save kernels.npz    # kernels of finite depth, to compare
python benchmarks/limit.py --compare kernels.npz # where neural-tangents is: see docs/theory.md for the versions

The whole command: `time depthmup limit configs/digits_resnet.yaml`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

ACTIVATIONS, DEPTHS = ("relu", "linear", "erf"), (4, 16)  # tanh has no closed form in neural-tangents


def inputs(samples: int) -> np.ndarray:
    """(samples, 64), of mean square 1."""
    drawn = np.random.default_rng(0).standard_normal((samples, 64))
    found: np.ndarray = drawn / np.sqrt((drawn**2).mean(axis=1, keepdims=True))
    return found


def show_time(what: str, solve: Callable[[], object]) -> None:
    begun = time.process_time()
    solve()
    print(f"{time.process_time() - begun:6.2f} s  {what}")


def time_solvers() -> None:
    from depthmup.models.limit.kernels import compute_finite_depth_kernel, compute_infinite_depth_kernel
    from depthmup.models.limit.linear import train_linear
    from depthmup.models.limit.network import Training, build_paper_network, extrapolate_depth
    from depthmup.models.limit.rich import train_rich

    one = Training(np.ones((1, 1)), np.ones(1), rate=0.05, steps=20)
    kernel = inputs(1000) @ inputs(1000).T / 64

    def extrapolate() -> object:
        return extrapolate_depth(
            {L: train_linear(build_paper_network("linear", L), one).outputs for L in (8, 16, 32, 64)}, 3
        )

    show_time(
        "exact linear: depth 64, 20 steps, 1 sample", lambda: train_linear(build_paper_network("linear", 64), one)
    )
    show_time("exact linear: its limit, from depths 8, 16, 32, 64", extrapolate)
    for name in ("relu", "erf", "tanh", "linear"):
        show_time(f"lazy {name}: 1,000 samples, infinite depth", partial(compute_infinite_depth_kernel, name, kernel))
    show_time(
        "lazy relu: 1,000 samples, depth 16",
        lambda: compute_finite_depth_kernel(build_paper_network("relu", 16), kernel),
    )
    few = Training(kernel[:6, :6], np.array([1.0, -1.0] * 3), rate=0.3, steps=8)
    network = build_paper_network("relu", 24)
    show_time("rich relu: depth 24, 6 samples, 8 steps, 12,000 sites", lambda: train_rich(network, few, 12000))


def save_kernels(path: str) -> None:
    from depthmup.models.limit.kernels import compute_finite_depth_kernel
    from depthmup.models.limit.network import build_paper_network

    kernel = inputs(20) @ inputs(20).T / 64
    found = {
        f"{name} {depth}": compute_finite_depth_kernel(build_paper_network(name, depth), kernel).total
        for name in ACTIVATIONS
        for depth in DEPTHS
    }
    np.savez(path, **found)


def compare(path: str) -> None:
    """Prints the largest relative difference of each saved kernel from that of neural-tangents."""
    import jax
    from neural_tangents import stax

    jax.config.update("jax_enable_x64", True)
    nonlinear = {"relu": stax.Relu, "erf": stax.Erf, "linear": stax.Identity}
    saved = np.load(path)
    for name in ACTIVATIONS:
        for depth in DEPTHS:
            branch = stax.serial(nonlinear[name](), stax.Dense(1, W_std=depth**-0.5))
            block = stax.serial(stax.FanOut(2), stax.parallel(branch, stax.Identity()), stax.FanInSum())
            layers = [stax.Dense(1), *[block] * depth, nonlinear[name](), stax.Dense(1)]
            _, _, kernel_of = stax.serial(*layers)
            theirs, ours = np.asarray(kernel_of(inputs(20), None, "ntk")), saved[f"{name} {depth}"]
            print(f"{name}, depth {depth}: largest difference {np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="FILE")
    parser.add_argument("--compare", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(arguments.compare)
    elif arguments.save:
        save_kernels(arguments.save)
    else:
        time_solvers()


if __name__ == "__main__":
    main()
