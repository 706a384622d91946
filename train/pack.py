"""K runs as one process: the replicas of train.replicas, each with the run directory that it would have alone."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data.batch import to_float
from data.errors import UserError
from data.index import Index
from data.loader import TrainingLoader, TrainingStream, evaluation_batches
from data.order import State
from models.build import build, build_meta
from models.init import materialize
from models.optimizer import build_optimizer, parameter_groups
from train import checkpoint
from train.config import RunConfig, to_yaml
from train.loop import FINAL_SHARE, describe, open_data, pick_device, run
from train.metrics import MetricsWriter, mean_loss
from train.packing import packable
from train.replicas import MOMENTS, Replicas
from train.rundir import RunDirectory
from train.schedule import schedule

LARGEST_CPU_BATCH = 16  # on a CPU packs of larger batches are hardly faster than run after run (docs/packed.md)
MEMORY_SHARE = 0.8  # of what is free: the rest is for workspaces and what lives for a moment in the backward pass


@dataclass
class Member:
    """One replica's run directory while the pack trains."""

    config: RunConfig
    directory: RunDirectory
    log: TextIO
    metrics: MetricsWriter
    active: bool = True  # neither diverged nor completed

    def finish(self, result: dict[str, Any]) -> None:
        self.metrics.close()
        self.log.close()
        self.directory.write_done(result)
        self.active = False


# ---------------------------------------------------------------- size of a pack


def replica_bytes(config: RunConfig, device: torch.device) -> int:
    """Memory that one replica takes on `device`: what its forward pass keeps for the backward pass, measured on one
    batch of zeros, its weights, their gradients (once as they come, once side by side) and the moments."""
    network = build(config.model, config.parameterization, 0, device).network
    own = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, model = config.train.global_batch_size, config.model
    images = torch.zeros(batch, model.in_channels, model.image_size, model.image_size, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = F.cross_entropy(network(images), labels)  # the graph keeps what was counted until here
    del loss
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return sum(kept.values()) + weights * (3 + len(MOMENTS[config.optimizer.name]))


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_pack(config: RunConfig, device: torch.device) -> int:
    """Most replicas of `config` that fit into the memory that is free on `device`; 0 when not even one does."""
    return int(free_bytes(device) * MEMORY_SHARE / replica_bytes(config, device))


def pack_size(config: RunConfig, device: torch.device) -> int:
    """How many such runs to train together: train.pack, but no more than fit, and one by one where packs do not pay
    (docs/packed.md)."""
    if device.type == "cpu" and config.train.global_batch_size > LARGEST_CPU_BATCH:
        return 1
    return min(config.train.pack, max(largest_pack(config, device), 1))


def check_pack(configs: Sequence[RunConfig]) -> None:
    """Raises UserError, naming the fields, when the runs cannot share a pack."""
    for number, config in enumerate(configs):
        if names := packable(configs[0], config):
            raise UserError(
                f"runs 0 and {number} cannot be packed together: {', '.join(names)}. Runs of one pack may differ in "
                "seed, learning rate, weight decay, momentum, schedule and parameterization only"
            )


# ---------------------------------------------------------------- checkpoints, one for each replica


def saved_steps(directory: RunDirectory) -> set[int]:
    if not directory.checkpoints.is_dir():
        return set()
    matches = (checkpoint.STEP.fullmatch(path.name) for path in directory.checkpoints.iterdir())
    return {int(match[1]) for match in matches if match}


def common_step(directories: Sequence[RunDirectory]) -> int:
    """The newest step of which every replica has a checkpoint, else 0. A kill between two replicas' saves leaves some
    of them one checkpoint ahead: theirs is taken away, as the pack goes through that step again."""
    step = max(set.intersection(*(saved_steps(directory) for directory in directories)), default=0)
    for directory in directories:
        for later in saved_steps(directory):
            if later > step:
                shutil.rmtree(directory.checkpoints / f"step-{later}")
    return step


def empty_run(config: RunConfig) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network and an optimizer on the CPU, as the run alone has them, to be filled."""
    scaled = build_meta(config.model, config.parameterization)
    materialize(scaled.network, "cpu")
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
    return scaled.network, build_optimizer(groups, config.optimizer)


def save_replica(replicas: Replicas, number: int, directory: RunDirectory, step: int, state: State) -> None:
    config = replicas.configs[number]
    network, optimizer = empty_run(config)
    network.load_state_dict(replicas.weights(number))
    moments = replicas.moments(number)
    if config.optimizer.name == "adamw" or config.optimizer.momentum:  # SGD without momentum keeps nothing
        for name, parameter in network.named_parameters():
            optimizer.state[parameter] = {key: moment.cpu().clone() for key, moment in moments[name].items()}
            if config.optimizer.name == "adamw":
                optimizer.state[parameter]["step"] = torch.tensor(float(step))
    checkpoint.save(directory.checkpoints, step, network, optimizer, state)


@torch.no_grad()
def load_replica(replicas: Replicas, number: int, directory: RunDirectory, step: int) -> State:
    network, optimizer = empty_run(replicas.configs[number])
    _, state = checkpoint.load(directory.checkpoints / f"step-{step}", network, optimizer)
    for name, tensor in network.state_dict().items():
        replicas.weights(number)[name].copy_(tensor)
    moments = replicas.moments(number)
    for name, parameter in network.named_parameters():
        for key, moment in moments[name].items():
            if key in optimizer.state[parameter]:
                moment.copy_(optimizer.state[parameter][key])
    return state


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(replicas: Replicas, index: Index, split: str) -> list[dict[str, float]]:
    """For each replica what train.loop.evaluate says, with every image decoded once."""
    config, device = replicas.configs[0], replicas.device
    model, batch_size = config.model, config.train.global_batch_size
    sums = torch.zeros(len(replicas.configs), 3, dtype=torch.float64, device=device)  # loss, top-1, top-5
    num_images = 0
    replicas.network.eval()
    for batch in evaluation_batches(
        config.data, index, split, batch_size, model.image_size, model.in_channels, device=device
    ):
        images, labels = to_float(batch, config.data, device)
        logits = replicas.forward(images[None]).float()  # (K, batch, num_classes)
        hits = logits.topk(min(5, model.num_classes), dim=2).indices == labels[:, None]  # (K, batch, 5)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        sums += torch.stack([losses.view(len(logits), -1).sum(1), hits[..., 0].sum(1), hits.sum((1, 2))], dim=1)
        num_images += len(labels)
    replicas.network.train()
    return [
        {
            f"{split}_loss": loss / num_images,
            f"{split}_top1": top1 / num_images,
            f"{split}_top5": top5 / num_images,
            f"{split}_images": num_images,
        }
        for loss, top1, top5 in sums.tolist()
    ]


# ---------------------------------------------------------------- the pack


def run_pack(configs: Sequence[RunConfig], paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Trains the runs `configs` in the directories `paths`, all at once; returns the content of each done.json.

    Resumes what is there: runs that are done are left alone, the others go on from the newest step of which all of
    them have a checkpoint. Raises UserError when they cannot be packed together, do not fit into memory, or the
    network has an operation that does not batch.
    """
    check_pack(configs)
    pending = [(c, path) for c, path in zip(configs, paths, strict=True) if not RunDirectory(path).done()]
    if len(pending) == 1:
        run(*pending[0])
    elif pending:
        train([c for c, _ in pending], [RunDirectory(path) for _, path in pending])
    return [RunDirectory(path).done() or {} for path in paths]


def train(configs: Sequence[RunConfig], directories: Sequence[RunDirectory]) -> None:
    """Trains runs none of which is done, to their done markers."""
    first = configs[0]
    device = pick_device(first.train.device)
    index = open_data(first)
    if len(configs) > (largest := largest_pack(first, device)):
        raise UserError(
            f"a pack of {len(configs)} needs more memory than is free on {device}: at most {largest} fit, "
            f"set train.pack={max(largest, 1)}"
        )
    replicas = Replicas(configs, device)

    # resume
    step = common_step(directories)
    states = {seed: State(seed=seed) for seed in replicas.seeds}
    members = []
    for number, (config, directory) in enumerate(zip(configs, directories, strict=True)):
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.config.write_text(to_yaml(config))
        log = directory.log.open("a", buffering=1)
        scaled = build_meta(config.model, config.parameterization)
        groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
        print(describe(config, scaled, groups, device), file=log)
        print(f"replica {number} of a pack of {len(configs)}", file=log)
        if step:
            states[config.seed] = load_replica(replicas, number, directory, step)
            print(f"resumed from step-{step}", file=log)
        members.append(Member(config, directory, log, MetricsWriter(directory.metrics, step)))
    replicas.steps_done.fill_(step)
    batch_size, num_steps = first.train.global_batch_size, first.train.num_steps
    model = first.model
    loaders = {
        seed: TrainingLoader(
            TrainingStream(first.data, index, state, batch_size, model.image_size, model.in_channels), device
        )
        for seed, state in states.items()
    }

    # loop
    losses: list[Tensor] = []  # (K,) of each step since the last log line, on the device
    started, logged_at, logged_step, data_wait = time.monotonic(), time.monotonic(), step, 0.0
    streams = [iter(loaders[seed]) for seed in replicas.seeds]
    while step < num_steps and any(member.active for member in members):
        waited_from = time.monotonic()
        batches = [to_float(next(stream), first.data, device) for stream in streams]
        data_wait += time.monotonic() - waited_from
        losses.append(
            replicas.step(
                torch.stack([images for images, _ in batches]), torch.stack([labels for _, labels in batches])
            )
        )
        step += 1

        saves = step % first.train.checkpoint_every == 0 and step < num_steps
        if step % first.train.log_every == 0 or step == num_steps or saves:  # no loss is pending when a save begins
            now = time.monotonic()
            line = {
                "step": step,
                "samples": step * batch_size,
                "images_per_second": (step - logged_step) * batch_size / (now - logged_at),
                "data_wait": data_wait / (now - logged_at),
            }
            write_lines(replicas, members, torch.stack(losses), line, time.monotonic() - started)
            losses.clear()
            logged_at, logged_step, data_wait = now, step, 0.0
        if saves:
            for number, member in enumerate(members):
                if member.active:
                    state = loaders[member.config.seed].state
                    save_replica(replicas, number, member.directory, step, state)

    # close
    if any(member.active for member in members):
        results: list[dict[str, Any]] = [{} for _ in members]
        for split in first.train.evaluate:
            results = [result | more for result, more in zip(results, evaluate(replicas, index, split), strict=True)]
        for number, member in enumerate(members):
            if not member.active:
                continue
            result: dict[str, Any] = {"outcome": "completed", "step": step, "samples": step * batch_size}
            result["train_loss"] = mean_loss(member.directory.metrics, math.ceil(num_steps * (1 - FINAL_SHARE)))
            save_file({name: t.cpu().clone() for name, t in replicas.weights(number).items()}, member.directory.weights)
            member.finish(result | results[number] | {"seconds": time.monotonic() - started})


def write_lines(
    replicas: Replicas, members: Sequence[Member], losses: Tensor, line: dict[str, Any], seconds: float
) -> None:
    """One line of metrics for each replica that still runs; closes those whose loss, (steps, K), is not finite."""
    num_steps = replicas.configs[0].train.num_steps
    norms = replicas.gradient_norms().flatten().tolist()
    for number, (member, column) in enumerate(zip(members, losses.T.tolist(), strict=True)):
        if not member.active:
            continue
        peak = member.config.optimizer.lr
        own = {
            "loss": sum(column) / len(column),
            "lr": peak * schedule(member.config.schedule, line["step"] - 1, num_steps),
            "grad_norm": norms[number],
        }
        member.metrics.write(line | own)
        bad = next((i for i, loss in enumerate(column) if not math.isfinite(loss)), None)
        if bad is not None:
            step = line["step"] - len(column) + 1 + bad
            member.finish({"outcome": "diverged", "step": step, "samples": line["samples"], "seconds": seconds})
