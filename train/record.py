"""What one run writes while it trains, alone or in a pack: the files of its directory, and nothing else."""

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from depthmup.data.files import write_atomically
from depthmup.data.order import State
from depthmup.train.checkpoint import Checkpoints, Progress, flush_to_disk
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World
from depthmup.train.metrics import MetricsWriter, average_loss, open_trackers
from depthmup.train.owner import join_fingerprints
from depthmup.train.reading import to_yaml
from depthmup.train.rundir import PRUNED, RunDirectory
from depthmup.train.schedule import schedule
from depthmup.train.trunk import read_trunk

OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors has it in its text alone
FINAL_SHARE = 0.1  # the reported training loss is the mean over this share of the steps, at the end
Watch = Callable[[dict[str, Any]], None]


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes whole, contiguous tensors; `path` is either complete and durable or as it was. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata)
        mode = path.parent.stat().st_mode & 0o666  # safetensors lets nobody else read it: whoever may see the run
        temporary.chmod(mode)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


class RunRecord:
    """Every process of a run holds one and calls the same methods; the first process alone writes metrics and results.

    losses: those since the last metrics line, as far as they have been read from the device; result: what the run came
    to, None while it trains.
    """

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        closing: ExitStack,
        world: World = World(),  # noqa: B008  (a frozen value)
        watch: Watch | None = None,
    ) -> None:
        """`closing` takes what has to be closed; `watch` gets every metrics line."""
        self.config, self.world, self.watch, self.closing = config, world, watch, closing
        self.directory = RunDirectory(path)
        path.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self.directory.checkpoints, config, self.log)
        closing.callback(self.checkpoints.close)
        self.metrics: MetricsWriter | None = None
        self.losses: list[float] = []
        self.seconds, self.code = 0.0, ""  # of all processes together, earlier starts included
        self.result: dict[str, Any] | None = None
        self.limits = self.directory.limits()

    def log(self, text: str) -> None:
        """To this process's log; warnings also to whoever watches the first process."""
        self.directory.add_to_log(text, self.world.rank)
        if text.startswith("warning: ") and self.world.is_main:
            print(text, file=sys.stderr)

    def resume(self, template: Callable[[], Any]) -> tuple[Progress, Any | None]:
        """Where the run stands, and the tensors of its newest checkpoint, None where it begins.

        Raises UserError as Checkpoints.load_newest, which says what `template` is, does.
        """
        loaded = self.checkpoints.load_newest(template)
        progress, tensors = loaded or (Progress(0, State(seed=self.config.seed), []), None)
        self.losses, self.seconds, self.code = progress.losses, progress.seconds, join_fingerprints(progress.code)
        return progress, tensors

    def open_metrics(self, step: int) -> None:
        """Writes the configuration, and opens metrics.jsonl, whose lines after `step` go, and the trackers."""
        if self.world.is_main:
            write_atomically(self.directory.config, to_yaml(self.config).encode())
            trackers = open_trackers(self.config, self.directory.path, step, self.log)
            self.metrics = MetricsWriter(self.directory.metrics, step, self.log, trackers)
            self.closing.callback(self.metrics.close)

    def find_first_bad_step(self, step: int) -> int | None:
        """The step of the first loss since the last metrics line that is not finite, after `step` steps."""
        bad = next((i for i, loss in enumerate(self.losses) if not math.isfinite(loss)), None)
        return None if bad is None else step - len(self.losses) + 1 + bad

    def save(self, step: int, data: State, template: Callable[[], Any]) -> None:
        """Saves a checkpoint of what `template` gives, unless a loss is not finite: then nothing is worth keeping."""
        if self.find_first_bad_step(step) is None:
            problem = self.metrics.flush() if self.metrics else None
            progress = Progress(step, data, self.losses[:], self.seconds, self.code)
            self.checkpoints.save(progress, template(), problem)

    def write_metrics(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        """One metrics line, which is returned; the window of losses begins anew."""
        train = self.config.train
        line = {
            "step": step,
            "samples": step * train.global_batch_size,
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.config.optimizer.lr * schedule(self.config.schedule, step - 1, train.num_steps),
            **measured,
        }
        self.losses = []
        if self.metrics:
            self.metrics.write(line)
        if self.watch:
            self.watch(line)
        return line

    def complete(
        self,
        step: int,
        found: dict[str, float],
        weights: dict[str, Tensor],
        averages: dict[str, Tensor] | None,
        unbalanced: str | None = None,
    ) -> None:
        """Writes the weights and, where there is one, their average, and what the evaluation found. `unbalanced`: what
        is wrong with the load of experts. Raises OSError."""
        result: dict[str, Any] = {"outcome": "completed", "step": step, "samples": self.samples(step), **found}
        if unbalanced:
            self.log(f"warning: {unbalanced}")
            result["unbalanced"] = unbalanced
        if self.metrics:
            if problem := self.metrics.flush():
                raise problem
            result["train_loss"] = average_loss(self.directory.metrics, math.ceil(step * (1 - FINAL_SHARE)))
            save_weights(self.directory.weights, weights)
            if averages is not None:
                save_weights(self.directory.average, averages)
        self.close(result)

    def diverge(self, bad_step: int, step: int) -> None:
        """Marks the run done after `step` steps as one whose loss of `bad_step` is not finite."""
        self.close({"outcome": "diverged", "step": bad_step, "samples": self.samples(step)})

    def prune(self, line: Mapping[str, Any]) -> None:
        """Ends the run early where it has a limit at the step of the metrics line, and the line's loss is above it."""
        step, metric = line["step"], self.limits.metric
        limit, loss = self.limits.steps.get(step), line.get(metric)
        if limit is None or loss is None or loss <= limit:
            return
        self.log(f"ended early after step {step}: its {metric} {loss:.4g} is above {limit:.4g}")
        self.close({"outcome": PRUNED, "step": step, "samples": self.samples(step), "loss": loss, "limit": limit})

    def samples(self, step: int) -> int:
        return step * self.config.train.global_batch_size

    def close(self, result: dict[str, Any]) -> None:
        self.checkpoints.wait()
        self.result = {**result, "seconds": self.seconds}
        if self.world.is_main:
            trunk = read_trunk(self.directory)
            origin = {"trunk": {"run": trunk.run, "step": trunk.step}} if trunk and trunk.taken else {}
            self.directory.write_done({**self.result, **self.checkpoints.owner, "code": self.code, **origin})
