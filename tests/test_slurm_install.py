"""The installed wheel works beside a project whose modules have our folders' names: here, under torchrun, on Slurm."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthmup.data.pack import pack
from slurm_cluster import Cluster, wait_for
from train_processes import ROOT, free_port

NAMES = ("models", "data", "train", "launch", "tests")
SOURCES = ("src", "models", "data", "train", "launch", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files beside its sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(source, copy / name)
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([*build, "--wheel-dir", str(out), str(copy)], check=True)
    (found,) = out.glob("*.whl")
    return found


class Project:
    """A folder of a user's with an environment of its own; whatever of it is imported by mistake ends the process."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.bin = folder / "my project", folder / "environment" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
        python = [sys.executable, "-m", "pip", "--quiet", "--python", str(self.bin / "python")]
        subprocess.run([*python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
        (packages,) = (folder / "environment").glob("lib/python*/site-packages")
        # the other packages of these tests' environment, without its .pth files: not the editable depthmup
        (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
        for place in (self.folder, folder / "on PYTHONPATH"):
            place.mkdir()
            for name in NAMES:
                (place / f"{name}.py").write_text(f"raise SystemExit('the {name}.py of {place} was imported')")
        self.environment = {**os.environ, "PYTHONPATH": str(folder / "on PYTHONPATH")}

    def run(self, *command: str) -> None:
        """Runs a command of the environment in the project's folder."""
        command = (str(self.bin / command[0]), *command[1:])
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    found = Project(tmp_path_factory.mktemp("user"), wheel)
    pack("sklearn:digits", found.folder / "shards", validation_share=0.2, shard_samples=300)
    run: dict[str, Any] = {
        "model": {
            **{"family": "conv_resnet", "width": 8, "depth": 3, "base_width": 8, "base_depth": 3},
            **{"num_classes": 10, "image_size": 8, "in_channels": 1},
        },
        "optimizer": {"name": "sgd", "lr": 0.0625},
        "data": {"name": "digits", "root": "shards", "minival": 0.1, "num_streams": 16},
        "train": {"samples": 64, "global_batch_size": 32, "device": "cpu"},
    }
    (found.folder / "run.yaml").write_text(yaml.safe_dump(run))
    run["study"] = {"name": "mine", "directory": "runs", "parameterizations": ["depth_mup"], "seeds": [0]}
    run["study"] |= {"sizes": [{"width": 8, "depth": 3}], "values": [2**-5]}
    (found.folder / "study.yaml").write_text(yaml.safe_dump(run))
    return found


def outcomes(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["outcome"] for file in folder.glob("runs/*/done.json")]


def test_the_wheel_holds_nothing_but_depthmup_and_brings_the_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"depthmup"}
    for file in ("models/build.py", "launch/jobs/worker.py", "launch/report/report.html.j2", "configs/digits_vit.yaml"):
        assert f"depthmup/{file}" in names
    assert "depthmup/configs/cluster/example_gpu.yaml" in names


def test_torchrun_imports_nothing_of_the_users(project: Project) -> None:
    project.run(
        *("python", "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"),
        *("-m", "depthmup.train", "run.yaml", "two", "parallel.engine=ddp"),
    )
    assert json.loads((project.folder / "two" / "done.json").read_text())["outcome"] == "completed"


def test_a_study_in_the_users_folder_trains_in_processes_of_its_own(project: Project) -> None:
    project.run("depthmup", "launch", "study.yaml", "launch.slots=1")
    assert wait_for(lambda: outcomes(project.folder / "runs" / "mine"), seconds=120) == ["completed"]


def test_a_job_on_slurm_runs_the_code_that_was_copied_and_nothing_of_the_users(
    project: Project, cluster: Cluster
) -> None:
    project.environment |= {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}
    project.environment["PYTHONSAFEPATH"] = "1"  # Python then does not look into the working folder
    project.run("depthmup", "launch", "study.yaml", "study.directory=on slurm", "launch.cluster=slurm")
    (installed,) = project.bin.parent.glob("lib/python*/site-packages/depthmup/launch/jobs/worker.py")
    installed.write_text("raise SystemExit('the job ran code that was edited after it was submitted')")
    assert wait_for(lambda: outcomes(project.folder / "on slurm" / "mine"), seconds=240) == ["completed"]
