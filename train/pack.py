"""K runs as one process: the replicas of train.replicas, each with the run directory that it would have alone."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.data.batch import to_float
from depthmup.data.errors import UserError
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream, evaluation_batches
from depthmup.data.order import State, places
from depthmup.data.workers import explained_deaths
from depthmup.models.build import build_meta
from depthmup.models.flops import training_flops
from depthmup.models.init import materialize
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.train.batch_norm import grouping
from depthmup.train.checkpoint import Checkpoints, Progress, complete, fault
from depthmup.train.config import RunConfig, to_yaml
from depthmup.train.distributed import World, pick_device
from depthmup.train.engine import Engine
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import FINAL_SHARE, describe, open_data, run, save_weights
from depthmup.train.metrics import MetricsWriter, mean_loss, open_trackers
from depthmup.train.owner import codes, finished, result_of
from depthmup.train.pack_memory import largest_pack
from depthmup.train.packing import packable
from depthmup.train.replicas import Replicas
from depthmup.train.rundir import RunDirectory
from depthmup.train.schedule import schedule
from depthmup.train.step import autocast_dtype, set_backends, set_tf32
from depthmup.train.telemetry import Clock, memory_gb, peak_flops


@dataclass
class Member:
    """One replica's run directory while the pack trains."""

    config: RunConfig
    directory: RunDirectory
    checkpoints: Checkpoints
    metrics: MetricsWriter
    seconds: float  # its share of the time that its packs took so far
    code: str  # fingerprints of the sources that trained it
    active: bool = True  # neither diverged nor completed


def check_pack(configs: Sequence[RunConfig]) -> None:
    """Raises UserError, naming the fields, when the runs cannot share a pack."""
    for number, config in enumerate(configs):
        if names := packable(configs[0], config):
            which = f"runs 0 and {number} cannot be packed together" if number else "packs do not know the setting of"
            raise UserError(
                f"{which}: {', '.join(names)}. Runs of one pack may differ in "
                "seed, learning rate, weight decay, momentum, schedule and parameterization only"
            )


# ---------------------------------------------------------------- checkpoints, one for each replica


def newest_step(directory: RunDirectory) -> int:
    """The step of the newest checkpoint that is whole, else 0."""
    whole = (path for path in complete(directory.checkpoints) if not fault(path, 0, 1))
    return max((int(path.name.removeprefix("step-")) for path in islice(whole, 1)), default=0)


def empty_run(config: RunConfig) -> Engine:
    """A network and an optimizer on the CPU, as the run alone has them, to be filled."""
    scaled = build_meta(config.model, config.parameterization)
    materialize(scaled.network, "cpu")
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
    return Engine(scaled.network, lambda network: build_optimizer(groups, config.optimizer))


def save_replica(replicas: Replicas, number: int, member: Member, progress: Progress) -> None:
    config, engine = member.config, empty_run(member.config)
    engine.network.load_state_dict(replicas.weights(number))
    moments = replicas.moments(number)
    if config.optimizer.name == "adamw" or config.optimizer.momentum:  # SGD without momentum keeps nothing
        for name, parameter in engine.network.named_parameters():
            engine.optimizer.state[parameter] = {key: moment.cpu().clone() for key, moment in moments[name].items()}
            if config.optimizer.name == "adamw":
                engine.optimizer.state[parameter]["step"] = torch.tensor(float(progress.step))
    member.checkpoints.save(progress, engine.state(), member.metrics.flush())


@torch.no_grad()
def load_replica(replicas: Replicas, number: int, checkpoints: Checkpoints) -> Progress:
    engine = empty_run(replicas.configs[number])
    loaded = checkpoints.load_newest(engine.state)
    assert loaded is not None  # newest_step has seen it
    progress, tensors = loaded
    engine.load_state(tensors)
    for name, tensor in engine.network.state_dict().items():
        replicas.weights(number)[name].copy_(tensor)
    moments = replicas.moments(number)
    for name, parameter in engine.network.named_parameters():
        for key, moment in moments[name].items():
            if key in engine.optimizer.state[parameter]:
                moment.copy_(engine.optimizer.state[parameter][key])
    return progress


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


def run_pack(
    configs: Sequence[RunConfig], paths: Sequence[Path], interrupt: Interrupt | None = None
) -> list[dict[str, Any]]:
    """Trains the runs `configs` in the directories `paths`, all at once; returns what each came to.

    Resumes what is there: runs that are done are left alone. Runs that stand at different steps, as after a kill
    between two replicas' saves, go on in a pack for each step, one after the other, as none gives up its checkpoint for
    the others. `interrupt` is looked at after every step: when set, all save and Interrupted is raised.
    Raises UserError when the runs cannot be packed together, do not fit into memory, or the network has an operation
    that does not batch.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError("runs of one pack need a directory each, found one twice")
    if len(configs) > 1:
        check_pack(configs)
    interrupt = interrupt or Interrupt()
    standing: dict[int, list[tuple[RunConfig, RunDirectory]]] = {}
    for config, path in zip(configs, paths, strict=True):
        if not finished(directory := RunDirectory(path), config):
            standing.setdefault(newest_step(directory), []).append((config, directory))
    for step in sorted(standing, reverse=True):
        pending = standing[step]
        if len(pending) == 1:
            [(config, directory)] = pending
            run(config, directory.path, interrupt=interrupt)
            continue
        with ExitStack() as closing:
            pack = Pack([c for c, _ in pending], [d for _, d in pending], step, closing)
            with explained_deaths():
                pack.train(interrupt)
    return [result_of(RunDirectory(path).done() or {}) for path in paths]


class Pack:
    """Runs none of which is done, and which all stand at `step`. `closing` takes what has to be closed."""

    def __init__(
        self, configs: Sequence[RunConfig], directories: Sequence[RunDirectory], step: int, closing: ExitStack
    ) -> None:
        self.config = first = configs[0]
        self.device = device = pick_device(first.train.device, World())
        self.index = open_data(first)
        set_tf32(first.train)
        set_backends(device)
        dtype = autocast_dtype(first.train, device)
        if len(configs) > (largest := largest_pack(first, device)):
            raise UserError(
                f"a pack of {len(configs)} needs more memory than is free on {device}: at most {largest} fit, "
                f"set train.pack={max(largest, 1)}"
            )
        self.replicas = Replicas(configs, device, dtype)
        shape = (first.model.in_channels, first.model.image_size, first.model.image_size)
        self.flops = training_flops(build_meta(first.model, first.parameterization).network, shape)
        self.peak = peak_flops(device, dtype)

        batch_norm, self.grouped = grouping(first, 1, 1), None
        if first.train.batch_norm_images:
            order = batch_norm.order(places(0, 1, first.data.num_streams, first.train.global_batch_size))
            self.grouped = torch.from_numpy(order).to(device)

        # resume
        self.step = step
        states = {seed: State(seed=seed) for seed in self.replicas.seeds}
        self.pending: list[Tensor] = []  # losses (K,) of each step that are still on the device
        self.read: list[list[float]] = []  # per replica, the losses since the last log line that have been read
        self.members: list[Member] = []
        for number, (config, directory) in enumerate(zip(configs, directories, strict=True)):
            directory.path.mkdir(parents=True, exist_ok=True)
            scaled = build_meta(config.model, config.parameterization)
            groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
            place = f"replica {number} of a pack of {len(configs)} on {device.type}, {dtype}"
            directory.add_to_log(describe(config, scaled, groups, place))
            if config.decay_warning:
                directory.add_to_log(f"warning: {config.decay_warning}")
            keep = first.train.keep_last, first.train.keep_every
            checkpoints = Checkpoints(directory.checkpoints, config, directory.add_to_log, *keep)
            closing.callback(checkpoints.close)
            progress = Progress(0, State(seed=config.seed), [])
            if self.step:
                progress = load_replica(self.replicas, number, checkpoints)
                if progress.step != self.step:  # the newest is whole, and cannot be read
                    raise UserError(
                        f"{directory.path} goes on from step {progress.step}, and its pack from step {self.step}: "
                        "train it alone"
                    )
            states[config.seed] = progress.data
            self.read.append(progress.losses)
            directory.config.write_text(to_yaml(config))
            trackers = open_trackers(config, directory.path, self.step, directory.add_to_log)
            metrics = MetricsWriter(directory.metrics, self.step, directory.add_to_log, trackers)
            closing.callback(metrics.close)
            self.members.append(Member(config, directory, checkpoints, metrics, progress.seconds, codes(progress.code)))
        self.replicas.steps_done.fill_(self.step)
        self.loaders = {seed: self.loader(state) for seed, state in states.items()}
        self.counted = time.monotonic()  # until when the members' seconds are

    def loader(self, state: State) -> TrainingLoader:
        config, model = self.config, self.config.model
        batch_size = config.train.global_batch_size
        stream = TrainingStream(config.data, self.index, state, batch_size, model.image_size, model.in_channels)
        return TrainingLoader(stream, self.device)

    @property
    def active(self) -> list[tuple[int, Member]]:
        return [(number, member) for number, member in enumerate(self.members) if member.active]

    def train(self, interrupt: Interrupt) -> None:
        """The loop, then evaluation and the done markers."""
        config, num_steps = self.config.train, self.config.train.num_steps
        streams = [iter(self.loaders[seed]) for seed in self.replicas.seeds]
        clock = Clock(self.step)
        while self.step < num_steps and self.active:
            waiting = time.monotonic()
            batches = [to_float(next(stream), self.config.data, self.device) for stream in streams]
            clock.waited += time.monotonic() - waiting
            images, labels = (torch.stack(tensors) for tensors in zip(*batches, strict=True))
            if self.grouped is not None:
                images, labels = images[:, self.grouped], labels[:, self.grouped]
            logs = config.logs(self.step + 1)
            before = self.replicas.values() if logs else []
            self.pending.append(self.replicas.step(images, labels))
            self.step += 1
            if logs:
                self.write_metrics(before, clock)
            if config.saves(self.step):
                self.save()
            if interrupt.requested and self.step < num_steps and self.active:
                self.save()
                for _, member in self.active:
                    member.checkpoints.wait()
                raise Interrupted(f"stopped after step {self.step} of {num_steps}, as asked")
        self.finish()

    def count_seconds(self) -> None:
        """Shares the time since the last call among the replicas that still run."""
        now = time.monotonic()
        for _, member in self.active:
            member.seconds += (now - self.counted) / len(self.active)
        self.counted = now

    def read_losses(self) -> None:
        if self.pending:
            for mine, losses in zip(self.read, torch.stack(self.pending).T.tolist(), strict=True):
                mine += losses
            self.pending.clear()

    def save(self) -> None:
        """A checkpoint of each replica whose losses are finite: the others are about to be recorded as diverged."""
        self.read_losses()
        self.count_seconds()
        for number, member in self.active:
            if all(map(math.isfinite, self.read[number])):
                state = self.loaders[member.config.seed].state
                progress = Progress(self.step, state, self.read[number][:], member.seconds, member.code)
                save_replica(self.replicas, number, member, progress)

    def write_metrics(self, before: list[Tensor], clock: Clock) -> None:
        """One line of metrics for each replica that still runs; marks those done whose loss is not finite.

        `before`: the weights before the last step. Here and in `save` alone the host waits for the device.
        """
        self.read_losses()
        self.count_seconds()
        batch_size = self.config.train.global_batch_size
        images_per_second, data_wait = clock.lap(self.step, batch_size)
        norms, logits = self.replicas.gradient_norms.tolist(), self.replicas.logit_rms.tolist()
        roles = self.replicas.role_statistics(before)
        for number, member in self.active:
            losses = self.read[number]
            line: dict[str, Any] = {
                "step": self.step,
                "samples": self.step * batch_size,
                "loss": sum(losses) / len(losses),
                "lr": member.config.optimizer.lr
                * schedule(member.config.schedule, self.step - 1, self.config.train.num_steps),
                "grad_norm": norms[number],
                "logit_rms": logits[number],
                "images_per_second": images_per_second,
                "data_wait": data_wait,
                **self.loaders[member.config.seed].bad.metrics(),
                "memory": memory_gb(self.device),
                **roles[number],
            }
            if self.peak:
                line["mfu"] = self.flops * images_per_second / self.peak
            member.metrics.write(line)
            bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
            if bad is not None:
                step = self.step - len(losses) + 1 + bad
                samples = self.step * batch_size
                self.close(member, {"outcome": "diverged", "step": step, "samples": samples})
        self.read = [[] for _ in self.members]

    def finish(self) -> None:
        """Evaluates, writes the weights, and marks the runs done."""
        if not self.active:
            return
        found: list[dict[str, float]] = [{} for _ in self.members]
        for split in self.config.train.evaluate:
            more = evaluate(self.replicas, self.index, split)
            found = [before | metrics for before, metrics in zip(found, more, strict=True)]
        self.count_seconds()
        samples = self.step * self.config.train.global_batch_size
        for number, member in self.active:
            result: dict[str, Any] = {"outcome": "completed", "step": self.step, "samples": samples, **found[number]}
            result["train_loss"] = mean_loss(member.directory.metrics, math.ceil(self.step * (1 - FINAL_SHARE)))
            weights = {name: tensor.cpu().clone() for name, tensor in self.replicas.weights(number).items()}
            save_weights(member.directory.weights, weights)
            self.close(member, result)

    def close(self, member: Member, result: dict[str, Any]) -> None:
        """Marks the run done."""
        result |= {"seconds": member.seconds, **member.checkpoints.owner, "code": member.code}
        for line in self.loaders[member.config.seed].bad.lines():
            member.directory.add_to_log(f"bad samples: {line}")
        member.checkpoints.wait()
        member.directory.write_done(result)
        member.active = False
