"""What cannot run where it is to run is refused before anything waits, with the mend; what is shipped fits."""

from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.data.order import list_streams
from depthmup.launch.cli import cli
from depthmup.launch.jobs.submit import write_dry_run_script
from depthmup.launch.reading import PLACES, read_study, read_study_or_run
from depthmup.launch.runs.fits import check_fits
from depthmup.launch.runs.plan import describe_jobs
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("cluster", "targets")
)
PROFILES = [path.stem for path in sorted((CONFIGS / "cluster").glob("*.yaml"))]


@cache
def runs_of(recipe: str) -> list[PlannedRun]:
    return Study(CONFIGS / recipe, read_study_or_run(CONFIGS / recipe)).runs


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("cluster", [*PLACES, *PROFILES])
def test_every_shipped_recipe_can_run_with_every_shipped_profile(recipe: str, cluster: str, tmp_path: Path) -> None:
    place = (f"launch.cluster={cluster}", f"study.directory={tmp_path}")
    study = Study(CONFIGS / recipe, read_study_or_run(CONFIGS / recipe, place))
    study.runs = runs_of(recipe)  # which are the same wherever they run: they are planned once
    check_fits(study)
    if study.file.launch.cluster == "slurm":
        assert "launch.jobs.worker" in write_dry_run_script(study)
    processes = study.file.launch.tasks
    for run in study.runs[:: max(len(study.runs) // 8, 1)]:  # what a process asks at its start
        config = run.config
        config.parallel.micro_batches(config.train.global_batch_size, processes)
        for rank in (0, processes - 1):
            assert list_streams(rank, processes, config.data.num_streams)


@pytest.mark.parametrize("num_workers", [0, 6, 8, 12, 16])
@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 8), (2, 8), (4, 8), (8, 8)])
def test_any_number_of_workers_can_read_64_streams(
    study_file: Path, nodes: int, gpus_per_node: int, num_workers: int
) -> None:
    place = ("launch.cluster=slurm", f"launch.nodes={nodes}", f"launch.gpus_per_node={gpus_per_node}")
    recipe = ("train.global_batch_size=256", "data.num_streams=64", f"data.num_workers={num_workers}")
    check_fits(Study(study_file, read_study(study_file, (*place, *recipe, "parallel.engine=ddp"))))


def refusal(study_file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_fits(Study(study_file, read_study(study_file, overrides)))
    assert "\n" not in str(error.value)
    return str(error.value)


NODES = ("launch.cluster=slurm", "launch.nodes=4", "launch.gpus_per_node=8")


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ((*NODES, "train.global_batch_size=64"), "data.num_streams=32 (another order"),
        ((*NODES, "train.global_batch_size=48"), "must be a multiple of the 32 processes: use 32 or 64"),
        (
            ("launch.cluster=slurm", "launch.nodes=3", "train.global_batch_size=192", "data.num_streams=64"),
            "must be a multiple of the 3 processes: use data.num_streams=48 (another order",
        ),
        ((*NODES, "train.global_batch_size=64", "data.num_streams=64", "parallel.engine=none"), "parallel.engine=ddp"),
        (
            (*NODES, "train.global_batch_size=64", "data.num_streams=64", "parallel.micro_batch_size=3"),
            "parallel.micro_batch_size 3 must divide the 2 images",
        ),
        (
            (
                *NODES,
                "train.global_batch_size=64",
                "data.num_streams=64",
                "launch.tasks_per_node=16",
                "train.device=auto",
            ),
            "launch.tasks_per_node 16 is more than launch.gpus_per_node 8",
        ),
        (("data.root=s3://bucket/shards", "data.window=epoch"), "copy the shards to a local disk"),
        (("data.backend=nvjpeg", "train.device=cpu"), "set train.device=cuda, or use data.backend=fast"),
        (
            ("data.backend=nvjpeg", "launch.cluster=slurm", "train.device=auto"),
            "set launch.gpus_per_node, or use data.back",
        ),
        (("launch.cluster=slurm", "train.device=cuda"), "set launch.gpus_per_node"),
        (("parallel.engine=deepspeed", "parallel.zero_stage=3", "train.ema=0.9"), "parallel.zero_stage=2"),
        (("model.norm=batch", "parallel.micro_batch_size=4"), "use parallel.micro_batch_size=32"),
        (
            (
                "launch.cluster=slurm",
                "launch.tasks_per_node=2",
                "model.norm=batch",
                "train.batch_norm_images=8",
                "parallel.micro_batch_size=2",
            ),
            "each of 2 process(es) needs 8 at once and has 2",
        ),
    ],
)
def test_a_run_that_would_end_on_its_nodes_is_refused_with_the_mend(
    study_file: Path, overrides: tuple[str, ...], mend: str
) -> None:
    assert mend in refusal(study_file, *overrides)


def test_a_gpu_that_decodes_is_asked_for_where_the_run_is_to_be(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = ("data.backend=nvjpeg", "train.device=auto")
    check_fits(Study(study_file, read_study(study_file, (*on_gpu, "launch.cluster=slurm", "launch.gpus_per_node=1"))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_fits(Study(study_file, read_study(study_file, on_gpu)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none here: use a machine with one, or use data.backend=fast" in refusal(study_file, *on_gpu)
    for command in ("plan", "launch", "transfer"):
        said = CliRunner().invoke(cli, [command, str(study_file), *on_gpu])
        assert "torch sees none here" in str(said.exception), command
    said = CliRunner().invoke(cli, ["launch", str(study_file), "--cluster", "slurm", "--dry-run", *on_gpu])
    assert "set launch.gpus_per_node, or use data.backend=fast" in str(said.exception)
    assert not (study_file.parent / "runs").exists()


def test_plan_dry_run_and_launch_refuse_it_all_three_and_leave_nothing(study_file: Path) -> None:
    place = ["launch.nodes=3", "train.global_batch_size=48"]
    wrong = [str(study_file), "--cluster", "slurm", *place]
    for command in (["plan", *wrong], ["launch", *wrong, "--dry-run"], ["launch", *wrong], ["transfer", *wrong]):
        said = CliRunner().invoke(cli, command)
        assert "use data.num_streams=" in str(said.exception), command
    assert not (study_file.parent / "runs").exists()


def test_plan_and_dry_run_say_how_many_jobs_come_out_on_what_and_for_how_long(study_file: Path) -> None:
    place = ["--cluster", "slurm", "launch.gpus_per_node=1", "launch.timeout_min=90", "launch.max_running=1"]
    place.append("train.pack=null")
    planned = CliRunner().invoke(cli, ["plan", str(study_file), *place]).output
    lines = ["2 jobs of up to 8 runs, in packs of up to 8, at most 1 at once", "each job: 1 GPU, up to 1 h 30 min"]
    lines.append("the packs are assumed: how many fit, a job finds on its own GPU")
    assert "\n".join(lines) in planned
    script = CliRunner().invoke(cli, ["launch", str(study_file), *place, "--dry-run"]).output
    assert script.endswith("".join(f"# {line}\n" for line in lines))
    nodes = ("launch.cluster=slurm", "launch.nodes=2", "launch.tasks_per_node=2", "launch.cpus_per_task=3")
    said = describe_jobs(Study(study_file, read_study(study_file, nodes)))
    assert said == ["12 jobs of up to 1 run, at most 12 at once", "each job: 2 nodes, 12 CPUs, up to 4 h 00 min"]
    here = describe_jobs(Study(study_file, read_study(study_file, ("launch.slots=3",))))
    assert here == ["12 runs here, 3 processes at once"]


def test_a_rate_of_a_role_that_the_network_has_not_is_refused_before_anything_runs(study_file: Path) -> None:
    assert "optimizer.role_lr.router would do nothing" in refusal(study_file, "optimizer.role_lr.router=4")
    check_fits(Study(study_file, read_study(study_file, ("optimizer.role_lr.input=4",))))


def test_a_budget_that_does_not_pay_for_the_first_round_is_refused_with_one_that_does(study_file: Path) -> None:
    values = "study.values={first: 2**-7, last: 2**-2}"
    said = refusal(study_file, values, "study.budget=0.01")
    assert "study.budget 0.01 does not pay for the first round, 3 values at the base" in said
    enough = said.rpartition("study.budget=")[2].split()[0]
    check_fits(Study(study_file, read_study(study_file, (values, f"study.budget={enough}"))))
