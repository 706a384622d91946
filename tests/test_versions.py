"""What has to work with every version of the dependencies that is allowed: one short way through all of the package.

The lowest and the newest versions take this way in environments of their own: see versions.sh.
"""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import depthmup
from depthmup.launch.cli import cli
from depthmup.train.loop import run
from depthmup.train.packs.pack import run_pack
from train_configs import VIT, losses, run_config

RESNET = {"family": "resnet", "width": 16, "depth": 4, "base_width": 16, "base_depth": 4}
SHORT = ("train.samples=128", "data.rand_augment=rand-m9", "data.mixup=0.2")


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(depthmup.__path__, "depthmup."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.parametrize(
    ("model", "optimizer", "engine"), [(VIT, "adamw", "none"), (RESNET, "sgd", "ddp"), (VIT, "muon", "fsdp")]
)
def test_a_network_trains_and_timm_loads_its_export(
    model: dict[str, Any], optimizer: str, engine: str, digits: Path, tmp_path: Path
) -> None:
    import timm  # here, since models.torchvision_ops must run before it

    overrides = (f"optimizer.name={optimizer}", "optimizer.lr=0.01", f"parallel.engine={engine}")
    run(run_config(digits, *SHORT, *overrides, model=model), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    with safe_open(out, "pt") as file:
        call = json.loads(file.metadata()["timm"])
    network = timm.create_model(call["model_name"], checkpoint_path=str(out), **call["arguments"])
    assert network.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_runs_train_in_a_pack(digits: Path, tmp_path: Path) -> None:
    configs = [run_config(digits, "train.samples=128", f"optimizer.lr={rate}", model=VIT) for rate in (0.01, 0.02)]
    run_pack(configs, [tmp_path / "0", tmp_path / "1"])
    assert [len(losses(tmp_path / name)) for name in "01"] == [4, 4]
