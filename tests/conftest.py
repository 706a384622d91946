"""Fixtures that several test files share: real shards of scikit-learn's digits, and small configurations on them."""

import os
import sys

import fork_server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child process
if "--tx" in sys.argv:  # the fork server of the test processes imports torch while this process does
    fork_server.address()

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain
from slurm_cluster import Cluster
from slurm_cluster import start as start_cluster
from slurm_stand_ins import fake as fake
from slurm_stand_ins import study_of as study_of
from train_configs import pack_digits

# The files of a lane are one process's, which brings up a cluster of its own for them. The lanes last about as long.
LANES = {
    **dict.fromkeys(("slurm_survival", "slurm_tune", "slurm_chain", "slurm_ladder"), "cluster 1"),
    **dict.fromkeys(("slurm_nodes", "slurm_launch", "slurm_install", "slurm_status"), "cluster 2"),
}
# Longest first: a file that begins last must not leave the other processes idle. Seconds of CPU on two busy cores.
LONG_FILES = {
    **{"train_pack": 50, "train_engines": 40, "launch_transfer": 30, "train_processes": 25, "train_settings": 40},
    **{"models_check": 35, "train_resume": 30, "launch_jobs": 25, "launch_packs": 20, "train_layout": 20},
    **{"launch_tune": 20, "models_limit": 20, "launch_page": 20, "launch_tuned": 20, "config_effects": 20},
}


def scope_of(nodeid: str) -> str:
    """What one test process takes as a whole: a lane, or a file."""
    file = nodeid.partition("::")[0]
    return LANES.get(name_of(file), file)


def name_of(file: str) -> str:
    return Path(file).stem.removeprefix("test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The clusters' tests come first: they wait most of their time, while other processes have the cores."""

    def when(item: pytest.Item) -> tuple[str, int]:
        name = name_of(item.nodeid.partition("::")[0])
        return LANES.get(name, "no cluster"), -LONG_FILES.get(name, 0)

    items.sort(key=when)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """All test processes have one fork server."""
    fork_server.address()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several test processes."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scheduling(config, log)


def torch_functions() -> dict[str, Any]:
    """The functions and classes of torch that a library may replace for the whole process, by owner and name."""
    owners = {"torch": torch, "nn": torch.nn, "nn.functional": torch.nn.functional}
    owners |= {"Tensor": torch.Tensor, "nn.Module": torch.nn.Module, "optim.Optimizer": torch.optim.Optimizer}
    return {
        f"{owner}.{name}": value for owner in owners for name, value in vars(owners[owner]).items() if callable(value)
    }


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was() -> Iterator[None]:
    """A file of tests that leaves a function of torch replaced fails itself, not those after it in the same process.

    Torch replaces some by its own, as `manual_seed` when its compiler is imported.
    """
    before = torch_functions()
    yield
    replaced = {name: value for name, value in torch_functions().items() if before.get(name, value) is not value}
    assert not {name for name, value in replaced.items() if not str(value.__module__).startswith("torch")}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits in several small shards, with train and val splits."""
    return pack_digits(tmp_path_factory.mktemp("shards") / "digits", validation_share=0.2, shard_samples=300)


def settings_on(root: Path) -> dict[str, Any]:
    """A run of 12 steps on the digits in `root`, as plain data: change it, then `from_plain(RunConfig, ...)`. Studies
    train one run after another: packs are for the tests that ask for them."""
    return {
        "model": {
            "family": "conv_resnet",
            **{"width": 8, "depth": 3, "base_width": 8, "base_depth": 3},
            **{"num_classes": 10, "image_size": 8, "in_channels": 1},
        },
        "optimizer": {"name": "sgd", "lr": 0.0625},
        "data": {"name": "digits", "root": str(root), "minival": 0.1, "num_streams": 16},
        "train": {
            **{"samples": 12 * 32, "global_batch_size": 32, "device": "cpu", "log_every": 2, "checkpoint_every": 4},
            "pack": 1,
        },
    }


@pytest.fixture
def run_settings(digits: Path) -> dict[str, Any]:
    return settings_on(digits)


@pytest.fixture
def run_config(run_settings: dict[str, Any]) -> RunConfig:
    return from_plain(RunConfig, run_settings, "test")


@pytest.fixture
def study_file(run_settings: dict[str, Any], tmp_path: Path) -> Path:
    """A study as a YAML file: 16 points (two parameterizations, two depths, four rates, one seed), 12 runs."""
    run_settings["study"] = {
        "name": "tiny",
        "directory": str(tmp_path / "runs"),
        "parameterizations": ["sp", "depth_mup"],
        "sizes": [{"width": 8, "depth": 3}, {"width": 8, "depth": 6}],
        "values": ["2**-7", "2**-6", "2**-5", "2**-4"],
        "extend": 0,
        "more_seeds": 0,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(run_settings))
    return path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm cluster of eight nodes on this machine, of this test process alone."""
    yield from start_cluster()
