"""One run, from its configuration to its done marker."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.batch import to_float
from data.errors import UserError
from data.index import Index
from data.loader import TrainingLoader, TrainingStream, evaluation_batches
from data.order import State
from models.build import ScaledModel, build
from models.flops import num_parameters
from models.optimizer import build_optimizer, parameter_groups
from train import checkpoint
from train.config import RunConfig, run_hash, to_yaml
from train.metrics import MetricsWriter, WandbTracker, mean_loss
from train.rundir import RunDirectory
from train.schedule import schedule, set_learning_rate

FINAL_SHARE = 0.1  # the reported training loss is the mean over this share of the steps, at the end


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU: use train.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def open_data(config: RunConfig) -> Index:
    """The data set's index. Raises UserError when it does not fit the model or a shard is missing."""
    index = Index.load(config.data.root, config.data.trust)
    index.check_files()
    if len(index.classes) != config.model.num_classes:
        raise UserError(
            f"{config.data.root} has {len(index.classes)} classes, but model.num_classes is {config.model.num_classes}"
        )
    return index


@torch.no_grad()
def evaluate(network: nn.Module, config: RunConfig, index: Index, split: str, device: torch.device) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy over `split`, each image counted once."""
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    model = config.model
    batches = evaluation_batches(
        config.data,
        index,
        split,
        config.train.global_batch_size,
        model.image_size,
        model.in_channels,
        device=device,
    )
    for batch in batches:
        images, labels = to_float(batch, config.data, device)
        logits = network(images).float()
        hits = logits.topk(min(5, model.num_classes), dim=1).indices == labels[:, None]  # (batch, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    network.train()
    loss_sum, top1, top5, images_seen = sums.tolist()
    return {
        f"{split}_loss": loss_sum / images_seen,
        f"{split}_top1": top1 / images_seen,
        f"{split}_top5": top5 / images_seen,
        f"{split}_images": int(images_seen),
    }


def gradient_norm(network: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


@dataclass
class LossWindow:
    """Losses since the last log line, kept on the device: reading them is the only wait of the host for it."""

    losses: list[Tensor]

    def drain(self, last_step: int) -> tuple[list[float], int | None]:
        """(losses as floats, step of the first one that is not finite)."""
        values = torch.stack(self.losses).tolist()
        self.losses.clear()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        return values, None if bad is None else last_step - len(values) + 1 + bad


def describe(config: RunConfig, scaled: ScaledModel, groups: list[dict[str, Any]], device: torch.device) -> str:
    """What a run is, for its log: never leaves open which parameterization and base it has."""
    model, p = config.model, scaled.scale.parameterization
    lines = [
        f"run {run_hash(config)}: {model.family} width {model.width} depth {model.depth}, "
        f"{num_parameters(scaled.network):,} parameters, on {device}",
        f"parameterization {p.name}, base width {model.base_width} depth {model.base_depth}, "
        f"branch multiplier {scaled.scale.branch_multiplier():.4g}, "
        f"readout multiplier {scaled.scale.readout_multiplier():.4g}",
    ]
    lines += [
        f"group {g['name']}: {len(g['params'])} tensors, lr {g['lr']:.4g} (x {g['lr_mult']:.4g}), "
        f"weight decay {g['weight_decay']:.4g}" + (f", eps {g['eps']:.4g}" if "eps" in g else "")
        for g in groups
    ]
    return "\n".join(lines)


def run(config: RunConfig, path: Path) -> dict[str, Any]:
    """Trains `config` in directory `path`, resuming what is there; returns the content of done.json."""
    directory = RunDirectory(path)
    if done := directory.done():
        return done
    path.mkdir(parents=True, exist_ok=True)
    directory.config.write_text(to_yaml(config))

    # data and model
    device = pick_device(config.train.device)
    index = open_data(config)
    scaled = build(config.model, config.parameterization, config.seed, device)
    network = scaled.network
    groups = parameter_groups(network, scaled.rules, scaled.scale, config.optimizer)
    optimizer = build_optimizer(groups, config.optimizer)
    log = directory.log.open("a", buffering=1)
    print(describe(config, scaled, groups, device), file=log)

    # resume
    step, state = 0, State(seed=config.seed)
    if saved := checkpoint.newest(directory.checkpoints):
        step, state = checkpoint.load(saved, network, optimizer)
        print(f"resumed from {saved.name}", file=log)
    batch_size, num_steps = config.train.global_batch_size, config.train.num_steps
    stream = TrainingStream(config.data, index, state, batch_size, config.model.image_size, config.model.in_channels)
    loader = TrainingLoader(stream, device)
    tracker = None
    if config.track.wandb != "off":
        tracker = WandbTracker(config.track, config, run_hash(config), path)
    metrics = MetricsWriter(directory.metrics, step, tracker)

    # loop
    window, diverged_at = LossWindow([]), None
    started, logged_at, logged_step, data_wait = time.monotonic(), time.monotonic(), step, 0.0
    batches = iter(loader)
    while step < num_steps:
        waited_from = time.monotonic()
        images, labels = to_float(next(batches), config.data, device)
        data_wait += time.monotonic() - waited_from
        set_learning_rate(optimizer, config.optimizer.lr, schedule(config.schedule, step, num_steps))
        loss = F.cross_entropy(network(images), labels, label_smoothing=config.train.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.train.clip_norm:
            grad_norm = nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_norm)
        optimizer.step()
        window.losses.append(loss.detach())
        step += 1

        saves = step % config.train.checkpoint_every == 0 and step < num_steps
        if step % config.train.log_every == 0 or step == num_steps or saves:  # no loss is pending when a save begins
            losses, diverged_at = window.drain(step)
            now = time.monotonic()
            metrics.write(
                {
                    "step": step,
                    "samples": step * batch_size,
                    "loss": sum(losses) / len(losses),
                    "lr": optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["lr_mult"],
                    "grad_norm": float(grad_norm if config.train.clip_norm else gradient_norm(network)),
                    "images_per_second": (step - logged_step) * batch_size / (now - logged_at),
                    "data_wait": data_wait / (now - logged_at),
                    "bad_samples": loader.bad.total(),
                }
            )
            logged_at, logged_step, data_wait = now, step, 0.0
            if diverged_at is not None:
                break
        if saves:
            checkpoint.save(directory.checkpoints, step, network, optimizer, loader.state)

    # close
    result: dict[str, Any] = {"outcome": "completed", "step": step, "samples": step * batch_size}
    if diverged_at is not None:
        result |= {"outcome": "diverged", "step": diverged_at}
    else:
        result["train_loss"] = mean_loss(directory.metrics, math.ceil(num_steps * (1 - FINAL_SHARE)))
        for split in config.train.evaluate:
            result |= evaluate(network, config, index, split, device)
        save_file({name: t.contiguous().cpu() for name, t in network.state_dict().items()}, directory.weights)
    result["seconds"] = time.monotonic() - started
    for line in loader.bad.lines():
        print(f"bad samples: {line}", file=log)
    metrics.close()
    log.close()
    directory.write_done(result)
    return result
