"""Fixtures that several test files share: real shards of scikit-learn's digits, and small configurations on them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child process

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster
from slurm_cluster import start as start_cluster

from data.pack import pack
from train.config import RunConfig, from_plain


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes, one takes a whole file, and one all that need the cluster: it comes first, since its
    tests wait most of their time."""
    on_cluster = {item: "cluster" in getattr(item, "fixturenames", ()) for item in items}
    for item, needs_it in on_cluster.items():
        item.add_marker(pytest.mark.xdist_group("cluster" if needs_it else item.path.name))
    items.sort(key=lambda item: not on_cluster[item])


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits in several small shards, with train and val splits."""
    root = tmp_path_factory.mktemp("shards") / "digits"
    pack("sklearn:digits", root, validation_share=0.2, shard_samples=300)
    return root


def settings_on(root: Path) -> dict[str, Any]:
    """A run of 12 steps on the digits in `root`, as plain data: change it, then `from_plain(RunConfig, ...)`."""
    return {
        "model": {
            "family": "conv_resnet",
            **{"width": 8, "depth": 3, "base_width": 8, "base_depth": 3},
            **{"num_classes": 10, "image_size": 8, "in_channels": 1},
        },
        "optimizer": {"name": "sgd", "lr": 0.0625},
        "data": {"name": "digits", "root": str(root), "minival": 0.1, "num_streams": 16},
        "train": {"samples": 12 * 32, "global_batch_size": 32, "device": "cpu", "log_every": 2, "checkpoint_every": 4},
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
    """A real Slurm cluster of six nodes on this machine."""
    yield from start_cluster()
