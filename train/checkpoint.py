"""Checkpoints: checkpoints/step-N/, written under a temporary name, made durable, then renamed into place.

A directory named step-N is therefore complete; a kill leaves at most a temporary one, which the next save removes.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.order import State

STEP = re.compile(r"step-(\d+)")


def newest(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    if not checkpoints.is_dir():
        return None
    complete = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP.fullmatch(path.name))]
    return max(complete)[1] if complete else None


def fsync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save(
    checkpoints: Path, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, state: State, keep: int = 2
) -> None:
    """Writes step-`step` and removes all but the newest `keep` checkpoints."""
    temporary = checkpoints / f"tmp-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model_state, optimizer_state = get_state_dict(network, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary, no_dist=True)
    (temporary / "state.json").write_text(json.dumps({"step": step, "data": vars(state)}))
    fsync_tree(temporary)
    os.rename(temporary, checkpoints / f"step-{step}")
    steps = sorted(int(match[1]) for path in checkpoints.iterdir() if (match := STEP.fullmatch(path.name)))
    for old in steps[:-keep]:
        shutil.rmtree(checkpoints / f"step-{old}")


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, State]:
    """Restores the network and the optimizer's moments; returns (steps done, data state)."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(network, optimizer)
    content: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(content, checkpoint_id=path, no_dist=True)
    set_state_dict(network, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)  # hyperparameters come from the config, never from a checkpoint
    saved = json.loads((path / "state.json").read_text())
    return saved["step"], State(**saved["data"])
