"""The loop: K >= 1 runs that step together, from their configurations to their done markers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.data.index import Index
from depthmup.data.workers import describe_too_few_cpus, explained_deaths
from depthmup.models.build import build_meta
from depthmup.models.flops import count_training_flops
from depthmup.train.batches import Batches, open_data, stack_seeds
from depthmup.train.config import RunConfig
from depthmup.train.distributed import (
    StopVote,
    World,
    average_over_ranks,
    gather_objects,
    pick_device,
    process_group,
    set_timeout,
)
from depthmup.train.engines.choice import choose
from depthmup.train.evaluate import evaluate_splits
from depthmup.train.expert_load import describe_imbalance
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.networks import Networks
from depthmup.train.one_network import OneNetwork
from depthmup.train.owner import read_finished, strip_owner
from depthmup.train.record import RunRecord, Watch
from depthmup.train.rundir import RunDirectory
from depthmup.train.telemetry import Clock, find_peak_flops, measure_memory


def run(
    config: RunConfig,
    path: Path,
    world: World = World(),  # noqa: B008  (a frozen value)
    interrupt: Interrupt | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains `config` in directory `path`, resuming what is there; returns what it came to (train.owner.strip_owner).

    Every process of a distributed run calls it with its own `world`. `interrupt` is looked at after every step: when
    any process has it set, all save and raise Interrupted. `watch` gets every metrics line. A loss that is not finite
    ends the run with `outcome: diverged`; anything else that goes wrong is raised, a user's mistake as UserError.
    """
    if done := read_finished(RunDirectory(path), config):
        return strip_owner(done)
    try:
        engine_name = choose(config.parallel, world.size)
        micro_batches = config.parallel.micro_batches(config.train.global_batch_size, world.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    device = pick_device(config.train.device, world)
    with process_group(world, device, config.parallel, engine_name), ExitStack() as closing:
        # ZeRO 3 replaces it for the whole process, whose next networks then compute no linear that find_roles knows.
        closing.callback(setattr, nn.functional, "linear", nn.functional.linear)
        try:
            record = RunRecord(config, path, closing, world, watch)
            index = open_data(config)
            networks = OneNetwork(config, engine_name, micro_batches, world, device)
            with explained_deaths():
                Loop(networks, [record], index, interrupt or Interrupt(), world).train()
        except Exception as error:
            if world.size > 1 and not isinstance(error, Interrupted):
                closing.pop_all()  # the others may be gone, and waiting for them would hide the reason
            raise
    assert record.result is not None
    return record.result


class Loop:
    """Runs that differ in nothing but what `networks` keeps apart; `records` are theirs, in the same order."""

    def __init__(
        self,
        networks: Networks,
        records: Sequence[RunRecord],
        index: Index,
        interrupt: Interrupt,
        world: World = World(),  # noqa: B008  (a frozen value)
    ) -> None:
        """Resumes what is there. Raises UserError when the runs do not all stand at one step."""
        self.networks, self.records, self.index, self.world = networks, list(records), index, world
        self.config = config = records[0].config  # what follows reads of it is the same for all
        self.peak, self.flops = find_peak_flops(networks.device, networks.dtype), 0
        if self.peak:
            shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
            self.flops = count_training_flops(build_meta(config.model, config.parameterization).network, shape)
        for record, description in zip(records, networks.descriptions, strict=True):
            record.log(description)

        self.measured: list[dict[str, float]] = []  # what the last metrics line of each run says of its network
        self.pending: list[Tensor] = []  # losses (K,) of each step that are still on the device
        resumed = [record.resume(partial(networks.state, number)) for number, record in enumerate(records)]
        self.step, states = resumed[0][0].step, {progress.data.seed: progress.data for progress, _ in resumed}
        for number, (progress, tensors) in enumerate(resumed):
            if progress.step != self.step:
                raise UserError(
                    f"{records[number].directory.path} goes on from step {progress.step}, and its pack from step "
                    f"{self.step}: train it alone"
                )
            if tensors is not None:
                networks.load(number, tensors, self.step)
        self.batches = {
            seed: Batches(config, index, states[seed], self.step, world, networks) for seed in networks.seeds
        }
        self.streams = {seed: iter(batches) for seed, batches in self.batches.items()}
        for record in records:
            for problem in (describe_too_few_cpus(config.data.num_workers), record.config.decay_warning):
                if problem:
                    record.log(f"warning: {problem}")
            record.open_metrics(self.step)
        self.rungs = {step for record in records for step in record.limits.steps if step < config.train.num_steps}
        self.vote, self.clock = StopVote(interrupt), Clock(self.step)
        self.counted = time.monotonic()  # until when the records' seconds are

    @property
    def active(self) -> Iterator[tuple[int, RunRecord]]:
        """The runs that still train, with their numbers."""
        return ((number, record) for number, record in enumerate(self.records) if record.result is None)

    def train(self) -> None:
        """The steps, then evaluation and the done markers. Raises Interrupted after a stop that was asked for."""
        config, num_steps, first_step = self.config, self.config.train.num_steps, self.step
        while self.step < num_steps and any(self.active):
            images, targets, uniform = self.clock.wait(self.next_batches)
            logs = config.train.logs(self.step + 1) or self.step + 1 in self.rungs
            self.pending.append(self.networks.step(images, targets, uniform, measure=logs))
            self.step += 1
            if self.step == first_step + 1:
                group = self.records[0].checkpoints.group
                set_timeout(timedelta(seconds=config.parallel.step_timeout), except_for=group)
            if logs:
                self.write_metrics()
            if config.train.saves(self.step):
                self.save()
            if self.vote.stop() and self.step < num_steps and any(self.active):
                self.stop()
            if logs:
                self.leave_out_ended()
        self.finish()

    def next_batches(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return stack_seeds([next(self.streams[seed]) for seed in self.networks.seeds])

    def leave_out_ended(self) -> None:
        """Goes on without the runs that have ended, where that pays: always on a CPU; on a GPU, where the smaller pack
        is captured anew, once half of them have. Two stay: with one, kernels add up in another order, and the last run
        would end otherwise in the last digits."""
        active = dict(self.active)
        ended = [number for number, record in enumerate(self.records) if record.result is not None]
        left = sorted([*active, *ended[: max(2 - len(active), 0)]])
        most = len(self.records) // 2 if self.networks.device.type == "cuda" else len(self.records) - 1
        if not active or len(left) > most:
            return
        for number, record in enumerate(self.records):
            if number not in left:
                self.log_bad_samples(record)
        self.networks.keep(left)
        self.records = [self.records[number] for number in left]
        self.measured = [self.measured[number] for number in left]
        for seed in self.batches.keys() - {*self.networks.seeds}:
            del self.batches[seed], self.streams[seed]

    def read_losses(self) -> None:
        """Hands the losses to the records: the mean over the processes."""
        if self.pending:
            losses = average_over_ranks(torch.stack(self.pending)).T.tolist()
            for record, mine in zip(self.records, losses, strict=True):
                record.losses += mine
            self.pending.clear()

    def count_seconds(self) -> None:
        """Shares the time of all processes since the last call among the runs that still train."""
        now, active = time.monotonic(), [record for _, record in self.active]
        for record in active:
            record.seconds += self.world.size * (now - self.counted) / len(active)
        self.counted = now

    def save(self) -> None:
        """A checkpoint of each run at the present step."""
        self.read_losses()
        self.count_seconds()
        for number, record in self.active:
            state = self.batches[record.config.seed].loader.state
            record.save(self.step, state, partial(self.networks.state, number))

    def stop(self) -> NoReturn:
        """Saves and raises Interrupted."""
        self.save()
        for _, record in self.active:
            record.checkpoints.wait()
        raise Interrupted(f"stopped after step {self.step} of {self.config.train.num_steps}, as asked")

    def write_metrics(self) -> None:
        """One metrics line for each run; those whose loss is not finite are done.

        A stop during an evaluation is obeyed, and leaves the lines without it, unless it decides which runs end early:
        in a loop that was stopped the same ones do. Here and in `save` alone the host waits for the device.
        """
        config, networks = self.config, self.networks
        self.read_losses()
        self.count_seconds()
        bad = {seed: batches.loader.bad for seed, batches in self.batches.items()}
        bad = {seed: mine.merge_ranks(others[seed] for others in gather_objects(bad)) for seed, mine in bad.items()}
        images_per_second, data_wait = self.clock.lap(self.step, config.train.global_batch_size)
        speed = {
            "images_per_second": images_per_second,
            "data_wait": data_wait,
            "memory": measure_memory(networks.device),
        }
        if self.peak:
            speed["mfu"] = self.flops * images_per_second / (self.peak * self.world.size)
        measured = networks.measurements()
        diverged_at = {number: record.find_first_bad_step(self.step) for number, record in self.active}
        stopped = False
        evaluated: list[dict[str, float]] = [{} for _ in self.records]
        limited = {record.limits.metric for record in self.records if self.step in record.limits.steps}
        decides = "minival_loss" in limited
        evaluates = config.train.evaluates(self.step) or decides
        if evaluates and None in diverged_at.values():
            try:
                with self.clock.stopped():
                    asked = (lambda: False) if decides else self.vote.stop
                    evaluated = evaluate_splits(networks, config, self.index, self.world, asked)
            except Interrupted as interrupted:
                self.records[0].log(f"{interrupted}, after step {self.step}")
                stopped = True
        self.measured = measured
        lines: dict[int, dict[str, Any]] = {}
        for number, record in list(self.active):
            counts = bad[record.config.seed].metrics()
            found = evaluated[number] if diverged_at[number] is None else {}
            lines[number] = record.write_metrics(self.step, {**speed, **counts, **measured[number], **found})
        for count in bad.values():
            count.check()
        for number, step in diverged_at.items():
            if step is not None:
                self.records[number].diverge(step, self.step)
            else:
                self.records[number].prune(lines[number])
        if stopped:
            self.stop()

    def copy_weights(self, number: int) -> dict[str, Tensor]:
        """What `full_weights` gives now: on a CPU its tensors are the network's own, which the average leaves again."""
        return {name: tensor.clone() for name, tensor in self.networks.full_weights(number).items()}

    def log_bad_samples(self, record: RunRecord) -> None:
        for line in self.batches[record.config.seed].loader.bad.lines():
            record.log(f"bad samples: {line}")

    def finish(self) -> None:
        """Evaluates the runs that still train, writes their weights, and marks them done."""
        active = list(self.active)
        if active:
            try:
                found = evaluate_splits(self.networks, self.config, self.index, self.world, self.vote.stop)
            except Interrupted:
                self.stop()
        for record in self.records:
            self.log_bad_samples(record)
        weights = {number: self.networks.full_weights(number) for number, _ in active}
        averages: dict[int, dict[str, Tensor]] = {}
        if active and self.networks.average:
            with self.networks.average.swapped_in():
                averages = {number: self.copy_weights(number) for number, _ in active}
        self.count_seconds()
        for number, record in active:
            problem = describe_imbalance(self.measured[number]) if self.measured else None
            record.complete(self.step, found[number], weights[number], averages.get(number), problem)
