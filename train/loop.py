"""One run, from its configuration to its done marker."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from depthmup.data.batch import to_float
from depthmup.data.errors import UserError
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.mixing import mix, mixes, pairs
from depthmup.data.order import State, places
from depthmup.data.workers import explained_deaths, too_few_cpus
from depthmup.models.build import ScaledModel, build, build_meta
from depthmup.models.flops import num_parameters, training_flops
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.train.average import WeightAverage
from depthmup.train.batch_norm import BatchStatistics, batch_norms, grouping, process_group_of
from depthmup.train.checkpoint import Checkpoints, Progress, fsync
from depthmup.train.config import RunConfig, run_hash, to_yaml
from depthmup.train.distributed import StopVote, World, gather_objects, pick_device, process_group, set_timeout
from depthmup.train.engine import Engine, average_buffers, choose, make_engine
from depthmup.train.evaluate import evaluate
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.metrics import MetricsWriter, mean_loss, open_trackers
from depthmup.train.owner import codes, finished, result_of
from depthmup.train.rundir import RunDirectory
from depthmup.train.schedule import schedule, set_learning_rate
from depthmup.train.step import (
    StepResult,
    autocast_dtype,
    prepare,
    set_backends,
    set_stream_type,
    set_tf32,
    take_step,
)
from depthmup.train.stochastic_depth import install_stochastic_depth
from depthmup.train.telemetry import Clock, LossWindow, RoleStatistics, memory_gb, peak_flops

FINAL_SHARE = 0.1  # the reported training loss is the mean over this share of the steps, at the end
Watch = Callable[[dict[str, Any]], None]


def open_data(config: RunConfig) -> Index:
    """The data set's index. Raises UserError when it does not fit the model or a shard is missing."""
    if config.data.rand_augment or mixes(config.data):
        import depthmup.models.torchvision_ops  # noqa: F401  (must run before timm, which data.distort and data.mixing import)
    index = Index.load(config.data.root, config.data.trust)
    index.check_files()
    for split in ("train", *config.train.evaluate):  # an empty one is to be known before training, not after
        index.spans(split, config.data.minival)
    if len(index.classes) != config.model.num_classes:
        raise UserError(
            f"{config.data.root} has {len(index.classes)} classes, but model.num_classes is {config.model.num_classes}"
        )
    return index


def describe(config: RunConfig, scaled: ScaledModel, groups: list[dict[str, Any]], place: str) -> str:
    """What a run is, for its log: never leaves open which parameterization and base it has."""
    model, p = config.model, scaled.scale.parameterization
    larger = " (larger than this model)" if model.base_width > model.width or model.base_depth > model.depth else ""
    lines = [
        f"run {run_hash(config)}: {model.family} width {model.width} depth {model.depth}, "
        f"{num_parameters(scaled.network):,} parameters, {place}",
        f"parameterization {p.name}, base width {model.base_width} depth {model.base_depth}{larger}, "
        f"branch multiplier {scaled.scale.branch_multiplier():.4g}, "
        f"readout multiplier {scaled.scale.readout_multiplier():.4g}",
    ]
    lines += [
        f"group {g['name']}: {len(g['params'])} tensors, lr {g['lr']:.4g} (x {g['lr_mult']:.4g}), "
        f"weight decay {g['weight_decay']:.4g}" + (f", eps {g['eps']:.4g}" if "eps" in g else "")
        for g in groups
    ]
    return "\n".join(lines)


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes whole, contiguous tensors; `path` is either complete and durable or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it: whoever may see the run
    fsync(temporary)
    os.replace(temporary, path)


def run(
    config: RunConfig,
    path: Path,
    world: World = World(),  # noqa: B008  (a frozen value)
    interrupt: Interrupt | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains `config` in directory `path`, resuming what is there; returns what it came to (train.owner.result_of).

    Every process of a distributed run calls it with its own `world`. `interrupt` is looked at after every step: when
    any process has it set, all save and raise Interrupted. `watch` gets every metrics line. A loss that is not finite
    ends the run with `outcome: diverged`; anything else that goes wrong is raised, a user's mistake as UserError.
    """
    if done := finished(RunDirectory(path), config):
        return result_of(done)
    try:
        engine_name = choose(config.parallel, world.size)
        micro_batches = config.parallel.micro_batches(config.train.global_batch_size, world.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    device = pick_device(config.train.device, world)
    with process_group(world, device, config.parallel, engine_name), ExitStack() as closing:
        try:
            this = Run(config, path, world, device, engine_name, micro_batches, closing, watch)
            with explained_deaths():
                return this.train(interrupt or Interrupt())
        except Exception as error:
            if world.size > 1 and not isinstance(error, Interrupted):
                closing.pop_all()  # the others may be gone, and waiting for them would hide the reason
            raise


class Run:
    """The parts of one run. `closing` takes what has to be closed."""

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        world: World,
        device: torch.device,
        engine_name: str,
        micro_batches: int,
        closing: ExitStack,
        watch: Watch | None,
    ) -> None:
        self.config, self.world, self.device, self.micro_batches, self.watch = (
            config,
            world,
            device,
            micro_batches,
            watch,
        )
        self.directory = RunDirectory(path)
        path.mkdir(parents=True, exist_ok=True)

        # data and model
        self.index = open_data(config)
        set_tf32(config.train)
        set_backends(device)
        self.dtype = autocast_dtype(config.train, device)
        scaled = build(config.model, config.parameterization, config.seed, device)
        branches, blocks = list(scaled.branches), list(scaled.blocks)
        self.draws = install_stochastic_depth(scaled.network, branches, blocks, config.train.drop_path)
        if self.dtype:
            stream_dtype = self.dtype if config.train.bf16_residual else torch.float32
            set_stream_type(scaled.network, blocks[0], branches, stream_dtype)
        self.channels_last = prepare(scaled.network, blocks, config.train, engine_name, device)
        self.arrange_images(scaled.network)
        shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
        self.flops = training_flops(build_meta(config.model, config.parameterization).network, shape)

        # engine and optimizer
        self.groups: list[dict[str, Any]] = []

        def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
            self.groups = parameter_groups(network, scaled.rules, scaled.scale, config.optimizer)
            place = f"{engine_name} on {world.size} x {device.type}, {micro_batches} micro-batch(es), {self.dtype}"
            self.log(describe(config, scaled, self.groups, place))
            return build_optimizer(self.groups, config.optimizer)

        self.engine: Engine = make_engine(
            engine_name,
            scaled.network,
            make_optimizer,
            blocks=blocks,
            config=config.parallel,
            autocast_dtype=self.dtype,
            clip_norm=config.train.clip_norm,
            micro_batches=micro_batches,
            micro_batch_size=config.train.global_batch_size // world.size // micro_batches,
        )
        self.average = None
        if config.train.ema:
            if engine_name == "deepspeed" and config.parallel.zero_stage == 3:
                raise UserError("train.ema cannot see ZeRO 3's shards: use parallel.engine=fsdp, or zero_stage 2")
            self.average = WeightAverage(scaled.network, config.train.ema)
        roles = {name: rule.role.value for name, rule in scaled.rules.items()}
        self.roles = RoleStatistics(scaled.network, roles) if engine_name != "deepspeed" else None

        # resume
        self.checkpoints = Checkpoints(
            self.directory.checkpoints, config, self.log, config.train.keep_last, config.train.keep_every
        )
        closing.callback(self.checkpoints.close)
        progress = Progress(0, State(seed=config.seed), [])
        if loaded := self.checkpoints.load_newest(self.tensors):
            progress, tensors = loaded
            self.engine.load_state(tensors)
        self.step, self.window = progress.step, LossWindow([], progress.losses)
        self.seconds_before, self.started, self.code = progress.seconds, time.monotonic(), codes(progress.code)
        stream = TrainingStream(
            config.data,
            self.index,
            progress.data,
            config.train.global_batch_size,
            config.model.image_size,
            config.model.in_channels,
            world.rank,
            world.size,
        )
        self.loader = TrainingLoader(stream, device)
        for problem in (too_few_cpus(config.data.num_workers), config.decay_warning):
            if problem:
                self.log(f"warning: {problem}")
        self.metrics = None
        if world.is_main:
            self.directory.config.write_text(to_yaml(config))
            trackers = open_trackers(config, path, self.step, self.log)
            self.metrics = MetricsWriter(self.directory.metrics, self.step, self.log, trackers)
            closing.callback(self.metrics.close)

    def arrange_images(self, network: nn.Module) -> None:
        """Decides in which order this process takes its images of a global batch, so that what is mixed, normalised
        and dropped together does not depend on the number of processes and micro-batches."""
        config, world = self.config, self.world
        batch = config.data.num_streams, config.train.global_batch_size
        self.places = places(world.rank, world.size, *batch)
        self.paired: Tensor | None = None
        self.grouped: Tensor | None = None
        self.statistics = None
        if mixes(config.data):
            order = pairs(self.places, *batch)
            self.places, self.paired = self.places[order], torch.from_numpy(order).to(self.device)
        if batch_norms(network):
            groups = grouping(config, world.size, self.micro_batches)
            self.statistics = BatchStatistics(network, groups.images, process_group_of(groups))
            if groups.num_groups > 1:
                order = groups.order(self.places)
                self.places, self.grouped = self.places[order], torch.from_numpy(order).to(self.device)

    def log(self, text: str) -> None:
        """To this process's log; warnings also to whoever watches the first process."""
        self.directory.add_to_log(text, self.world.rank)
        if text.startswith("warning: ") and self.world.is_main:
            print(text, file=sys.stderr)

    def tensors(self) -> dict[str, Any]:
        """Everything that a checkpoint holds. The average shares its tensors with it, so loading fills it in place."""
        state = self.engine.state()
        return {**state, "average": self.average.weights} if self.average else dict(state)

    def save(self) -> None:
        """Saves a checkpoint of the present step, unless a loss is not finite: then there is nothing worth keeping."""
        if not self.window.finite():
            return
        self.average_statistics()
        problem = self.metrics.flush() if self.metrics else None
        progress = Progress(self.step, self.loader.state, self.window.read[:], self.seconds(), self.code)
        self.checkpoints.save(progress, self.tensors(), problem)

    def average_statistics(self) -> None:
        """What is written of BatchNorm is the mean over the processes."""
        average_buffers(self.engine.network)
        if self.average:
            with self.average.swapped_in():
                average_buffers(self.engine.network)

    def seconds(self) -> float:
        """Of all processes together, those of earlier starts up to the checkpoint included."""
        return self.seconds_before + self.world.size * (time.monotonic() - self.started)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets of the steps from the present one on, as `take_step` wants them."""
        config = self.config
        for step, batch in enumerate(self.loader, start=self.step):
            images, targets = to_float(batch, config.data, self.device, self.channels_last)
            if self.paired is not None:
                images, targets = images[self.paired], targets[self.paired]
                images, targets = mix(images, targets, config.data, config.model.num_classes, config.seed, step)
            if self.grouped is not None:
                images, targets = images[self.grouped], targets[self.grouped]
            yield images, targets

    def train(self, interrupt: Interrupt) -> dict[str, Any]:
        """The loop, then evaluation and the done marker."""
        config, engine, num_steps = self.config, self.engine, self.config.train.num_steps
        batches, vote, clock = self.batches(), StopVote(interrupt), Clock(self.step)
        first_step, diverged_at = self.step, None
        while self.step < num_steps:
            images, targets = clock.wait(lambda: next(batches))
            self.draws.start_step(config.seed, self.step, config.train.global_batch_size, self.places, self.device)
            set_learning_rate(engine.optimizer, config.optimizer.lr, schedule(config.schedule, self.step, num_steps))
            logs = config.train.logs(self.step + 1)
            if logs and self.roles:
                self.roles.before_step()
            result = take_step(
                engine,
                images,
                targets,
                micro_batches=self.micro_batches,
                statistics=self.statistics,
                draws=self.draws,
                autocast_dtype=self.dtype,
                label_smoothing=config.train.label_smoothing,
                clip_norm=config.train.clip_norm,
            )
            if self.average:
                self.average.update(self.step)
            self.window.pending.append(result.loss)
            self.step += 1
            if self.step == first_step + 1:
                set_timeout(timedelta(seconds=config.parallel.step_timeout), except_for=self.checkpoints.group)
            if logs and (diverged_at := self.write_metrics(result, clock, vote)) is not None:
                break
            if config.train.saves(self.step):
                self.save()
            if vote.stop() and self.step < num_steps:
                self.stop()
        self.checkpoints.wait()
        return self.finish(diverged_at, vote)

    def stop(self) -> NoReturn:
        """Saves and raises Interrupted."""
        self.save()
        self.checkpoints.wait()
        raise Interrupted(f"stopped after step {self.step} of {self.config.train.num_steps}, as asked")

    def write_metrics(self, result: StepResult, clock: Clock, vote: StopVote) -> int | None:
        """Writes one metrics line; returns the step of the first loss since the last one that is not finite.

        A stop during an evaluation is obeyed, and leaves the line without it. The only place in the loop where the host
        waits for the device.
        """
        config, engine = self.config, self.engine
        losses, diverged_at = self.window.drain(self.step)
        bad = self.loader.bad.over_ranks(gather_objects(self.loader.bad))
        images_per_second, data_wait = clock.lap(self.step, config.train.global_batch_size)
        line: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * config.train.global_batch_size,
            "loss": sum(losses) / len(losses),
            "lr": engine.optimizer.param_groups[0]["lr"] / engine.optimizer.param_groups[0]["lr_mult"],
            "grad_norm": float(engine.gradient_norm() if result.grad_norm is None else result.grad_norm),
            "logit_rms": float(result.logits.float().square().mean().sqrt()),
            "images_per_second": images_per_second,
            "data_wait": data_wait,
            **bad.metrics(),
            "memory": memory_gb(self.device),
        }
        if peak := peak_flops(self.device, self.dtype):
            line["mfu"] = self.flops * images_per_second / (peak * self.world.size)
        if self.roles:
            line |= self.roles.after_step()
        stopped = False
        if config.train.evaluates(self.step) and diverged_at is None:
            try:
                with clock.stopped():
                    line |= self.evaluate(vote.stop)
            except Interrupted as interrupted:
                self.log(f"{interrupted}, after step {self.step}")
                stopped = True
        if self.metrics:
            self.metrics.write(line)
        if self.watch:
            self.watch(line)
        bad.check()
        if stopped:
            self.stop()
        return diverged_at

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float]:
        """Metrics of every split in `train.evaluate`; with an average of the weights also its own, as SPLIT_ema_...

        `stop` is asked after every batch. Raises Interrupted when it says so.
        """
        found: dict[str, float] = {}
        arguments = (self.config, self.index, self.world, self.device, self.dtype, self.channels_last, stop)
        for split in self.config.train.evaluate:
            found |= evaluate(self.engine, split, *arguments)
            if self.average:
                with self.average.swapped_in():
                    averaged = evaluate(self.engine, split, *arguments)
                found |= {key.replace(split, f"{split}_ema", 1): value for key, value in averaged.items()}
        return found

    def finish(self, diverged_at: int | None, vote: StopVote) -> dict[str, Any]:
        """Evaluates, writes the weights, and marks the run done. When asked to stop meanwhile: saves, Interrupted."""
        result: dict[str, Any] = {"outcome": "completed", "step": self.step}
        if diverged_at is not None:
            result = {"outcome": "diverged", "step": diverged_at}
        result["samples"] = self.step * self.config.train.global_batch_size
        if diverged_at is None:
            try:
                result |= self.evaluate(vote.stop)
            except Interrupted:
                self.stop()
            self.average_statistics()
            weights = self.engine.full_weights()
            if self.average:
                with self.average.swapped_in():
                    averaged = self.engine.full_weights()
            if self.metrics:
                if problem := self.metrics.flush():
                    raise problem
                after = math.ceil(self.step * (1 - FINAL_SHARE))
                result["train_loss"] = mean_loss(self.directory.metrics, after)
                save_weights(self.directory.weights, weights)
                if self.average:
                    save_weights(self.directory.average, averaged)
        result["seconds"] = self.seconds()
        for line in self.loader.bad.lines():
            self.log(f"bad samples: {line}")
        if self.world.is_main:
            self.directory.write_done({**result, **self.checkpoints.owner, "code": self.code})
        return result
