"""Whether a study's runs can run where they are to run: told before anything waits."""

import math
from collections.abc import Iterator
from pathlib import Path

from depthmup.data.config import OTHER_DECODER, DataConfig, find_window_misfit
from depthmup.data.errors import UserError
from depthmup.data.index import INDEX_NAME, Index, show_count
from depthmup.data.order import find_batch_misfit, list_streams
from depthmup.launch.config import LaunchConfig
from depthmup.launch.runs.design import build_design
from depthmup.launch.runs.grouping import check_packable
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.study import Study
from depthmup.models.errors import ModelError
from depthmup.models.optimizer_config import RoleRates
from depthmup.train.config import RunConfig


def find_misfits(run: RunConfig, config: LaunchConfig) -> Iterator[str]:
    """What would end the run on the nodes that it is to run on, each with the mend."""
    processes, parallel = config.tasks, run.parallel
    if processes > 1 and parallel.engine == "none":
        yield "parallel.engine none joins no processes: use parallel.engine=ddp, fsdp or deepspeed"
    try:
        micro_batches = parallel.micro_batches(run.train.global_batch_size, processes)
        parallel.copies(processes)
        if getattr(run.model, "norm", None) == "batch":
            from depthmup.train.batch_norm import choose_grouping  # with torch, which other plans do without

            choose_grouping(run, processes, micro_batches)
    except (ValueError, UserError) as error:
        yield str(error)
    try:
        list_streams(0, processes, run.data.num_streams)
    except UserError as error:
        yield f"{error}: use {mend_streams(run.data, run.train.global_batch_size, processes)}"
    if misfit := find_window_misfit(run.data, run.data.root):
        yield misfit
    if run.data.backend == "nvjpeg" and (missing := find_missing_gpu(run, config)):
        yield f"data.backend nvjpeg decodes on a GPU, and {missing}, or {OTHER_DECODER}"
    if parallel.engine == "deepspeed" and parallel.zero_stage == 3 and run.train.ema:
        yield "train.ema cannot see ZeRO 3's shards: use parallel.engine=fsdp, or parallel.zero_stage=2"
    if config.cluster != "slurm":
        return
    tasks_per_node = processes // config.nodes
    if run.train.device == "cuda" and not config.gpus_per_node:
        yield "train.device is cuda, but no GPU is asked for: set launch.gpus_per_node, or train.device=auto"
    if run.train.device != "cpu" and tasks_per_node > config.gpus_per_node > 1:
        yield (
            f"launch.tasks_per_node {tasks_per_node} is more than launch.gpus_per_node {config.gpus_per_node}: each "
            "process takes a GPU of its own"
        )


def find_missing_gpu(run: RunConfig, config: LaunchConfig) -> str | None:
    """Why a run has no GPU where it is to run, and how it gets one; None where it has."""
    if run.train.device == "cpu":
        return "train.device is cpu: set train.device=cuda"
    if config.cluster == "slurm":
        return None if config.gpus_per_node else "no GPU is asked for: set launch.gpus_per_node"
    import torch  # which other plans do without

    return None if torch.cuda.is_available() else "torch sees none here: use a machine with one"


def find_idle_roles(run: RunConfig) -> Iterator[str]:
    """What is wrong with rates of roles, where the network has no parameter of one."""
    if run.optimizer.role_lr == RoleRates():
        return
    from depthmup.models.build import build_meta  # with torch, which other plans do without
    from depthmup.models.optimizer import parameter_groups

    scaled = build_meta(run.model, run.parameterization)
    try:
        parameter_groups(scaled.network, scaled.rules, scaled.scale, run.resolved_optimizer)
    except ModelError as error:
        yield str(error)


def mend_streams(data: DataConfig, global_batch_size: int, processes: int) -> str:
    """What to use where the processes of a run do not divide its streams."""
    streams = range(processes, global_batch_size + 1, processes)
    fitting = [count for count in streams if global_batch_size % count == 0]
    if not fitting:
        return "another number of processes"
    nearest = min(fitting, key=lambda count: abs(count - data.num_streams))
    return f"data.num_streams={nearest} (another order of the samples: another run), or another number of processes"


def check_first_round(study: Study) -> None:
    """Raises UserError for a budget that an adaptive design's first round, which always runs, is beyond."""
    settings = study.file.study
    if not settings.adaptive or isinstance(study, JointStudy):
        return
    design = build_design(study)
    first = len(settings.coarse) * design.flops[settings.sizes[0]]
    if first > design.budget * (1 + 1e-9):
        enough = math.ceil(100 * settings.budget * first / design.budget) / 100
        raise UserError(
            f"{study.path}: study.budget {settings.budget:g} does not pay for the first round, "
            f"{len(settings.coarse)} values at the base: set study.budget={enough:g} at least"
        )


def list_configs(study: Study) -> list[RunConfig]:
    """Of the runs so far and of examples of later ones."""
    choices = study.choices if isinstance(study, JointStudy) else []
    return [run.config for run in (*study.runs, *study.examples, *choices)]


def check_batches(study: Study, index: Index) -> None:
    """Raises UserError where the training samples of `index` are less than a run's batch."""
    runs = list_configs(study)
    kinds = dict.fromkeys((run.data.minival, run.data.num_streams, run.train.global_batch_size) for run in runs)
    counted = ((index.count_training_samples(minival), *given) for minival, *given in kinds)
    misfits = (find_batch_misfit(samples, *given) for samples, *given in counted if samples)
    if found := dict.fromkeys(filter(None, misfits)):
        raise UserError(f"{study.path}: {'; '.join(found)}")


def check_fits(study: Study) -> None:
    """Raises UserError, with every mend, when runs cannot run where they are to run, or on the shards that are here."""
    config, data, runs = study.file.launch, study.file.data, list_configs(study)
    by_rates = {run.optimizer.role_lr: run for run in runs}
    found = list(
        dict.fromkeys(
            [
                *(words for run in runs for words in find_misfits(run, config)),
                *(words for run in by_rates.values() for words in find_idle_roles(run)),
            ]
        )
    )
    if found:
        processes = show_count(config.tasks, "process")
        raise UserError(f"{study.path}, {processes} a run: {'; '.join(found)}")
    if study.file.study.ladder and config.tasks > 1:
        raise UserError(
            f"{study.path}: a job of {config.tasks} processes trains one run, and study.ladder needs a trunk's "
            "branches after it in one job: use one process a run, or leave study.ladder out"
        )
    if (Path(data.root) / INDEX_NAME).exists():  # else they are to be packed first, or are remote
        check_batches(study, Index.load(data.root, data.trust))
    check_packable(study.runs)
    check_first_round(study)
