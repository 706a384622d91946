"""Runs -> jobs: slots on this machine, or arrays on Slurm.

submitit writes the sbatch script. The job's command is our own worker and not a pickle: submitit moves its pickles into
place after sbatch has returned, so a launcher that is killed in between leaves an array that fails; ours reads the list
of run directories that was written before. Local slots run the same worker.
"""

import fcntl
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import submitit

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.lock import flock
from depthmup.launch.config import LaunchConfig
from depthmup.launch.jobs import slurm
from depthmup.launch.jobs.code_copy import copy_code, hash_sources, list_sources
from depthmup.launch.jobs.hold import Hold
from depthmup.launch.jobs.submission import Submission
from depthmup.launch.jobs.worker import train_packs
from depthmup.launch.runs.fits import check_fits
from depthmup.launch.runs.grouping import assign_gpus, group_packs, make_packs
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.train.lock import write_holder
from depthmup.train.rundir import EXIT_LOST_PEER, EXIT_REQUEUE, RunDirectory


def submit_local(
    packs: Sequence[Sequence[PlannedRun]], config: LaunchConfig, folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Starts as many slots as run side by side; each works through the same list of packs.

    A session of their own keeps Ctrl-C and a closed terminal from them: they are told to stop when they are to stop.
    """
    tasks = group_packs(packs, 1)
    submission = Submission.create(folder.absolute(), "local", tasks, {"hold_after": config.hold_after})
    slots = []
    for number, gpu in enumerate(assign_gpus(config)[: len(tasks)]):
        environment = slurm.clean_environment()
        environment["OMP_NUM_THREADS"] = "1"  # two threads a process on busy cores were 3 to 6 times slower than one
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "depthmup.launch.jobs.worker", str(submission.file), "--local"]
        name = submission.path / f"slot-{number}"
        with open(name.with_suffix(".out"), "wb") as log, open(name.with_suffix(".lock"), "w") as lock:
            flock(lock, fcntl.LOCK_EX)  # ours until the slot, which inherits it, has ended
            slot = subprocess.Popen(
                command,
                env=environment,
                cwd=submission.path,  # no file of the user's is imported there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            write_holder(lock, slot.pid)
        slots.append(slot)
    return slots


def run_here(packs: Sequence[Sequence[PlannedRun]], config: LaunchConfig, folder: Path) -> None:
    """Trains one pack after another in this process. Raises KeyboardInterrupt when it was told to stop, as by Ctrl-C:
    then the runs have saved, unless it was told twice."""
    directories = [[RunDirectory(run.directory.path.absolute()) for run in pack] for pack in packs]
    submission = Submission.create(folder.absolute(), "debug", group_packs(packs, 1), {"hold_after": config.hold_after})
    hold = Hold(submission, list(chain.from_iterable(directories)), config.hold_after)
    if train_packs(directories, signal.SIGINT, hold=hold) == EXIT_REQUEUE:
        raise KeyboardInterrupt


# ---------------------------------------------------------------- Slurm

# The user's own setup lines come first. What they set for themselves, as bash's strict mode, must not end the script
# where a worker ends with another code than 0: what comes after that asks for the requeue.
#
# A worker ends with EXIT_REQUEUE once it has saved, or by the signal when that comes before it listens. The batch
# script asks for the requeue, since a process of the step could be killed by that very requeue before it has asked.
# A job that Slurm no longer calls RUNNING was requeued by another, or cancelled. One that was requeued since may be
# RUNNING again, when this script was frozen with its node: its successor must not be requeued. TERM is trapped so that
# the script outlives its step, and slurmctld may be away for a moment. Why the job ends is noted for `status`.
SETUP = (
    "set +eu +o pipefail",
    "trap - ERR",
    "trap : TERM",
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",  # srun no longer inherits sbatch's value since Slurm 22.05
    "export DEPTHMUP_BEGAN=$(date +%s)",
    "export DEPTHMUP_LOG_START=$(stat -Lc %s /proc/$$/fd/1)",  # before it, earlier starts of the job
    "export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}} PYTHONUNBUFFERED=1",
)
TOLD = f"{EXIT_REQUEUE}|{128 + signal.SIGUSR2}|{128 + signal.SIGTERM}"
TEARDOWN = (
    "code=$?",
    f"case $code in 0|{TOLD}) ;; *) {{worker}} --ended $code; code=$?;; esac",
    "case $code in",
    f"{TOLD}|{EXIT_LOST_PEER})",
    "  for try in 1 2 3 4 5; do",
    "    found=$(squeue --noheader --job=$SLURM_JOB_ID --Format=State,PreemptTime,RestartCnt) && break || sleep 5",
    "  done",
    '  IFS=" " read -r state preempted restarts <<< "$found"',
    "  restart=${{SLURM_RESTART_COUNT:-0}} cause=signal",
    '  [ $SECONDS -lt {late} ] || cause="time limit"',
    f'  [ $code != {EXIT_LOST_PEER} ] || cause="a process was lost"',
    '  [ "$state" = RUNNING ] || cause=cancelled',
    '  [ "${{restarts:-0}}" -le $restart ] || cause=requeued',
    '  [ "${{preempted:-N/A}}" = N/A ] || cause=preempted',
    # on a line of its own, also after half a line that a full disk has left
    """  [ -z "$found" ] || printf '\\n{{"job": "%s", "restart": %d, "cause": "%s"}}\\n' """
    '${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID $restart "$cause" >> {stopped}',
    '  [ "$state" = RUNNING ] && [ "${{restarts:-0}}" -le $restart ] && scontrol requeue $SLURM_JOB_ID;;',
    "esac",
    "exit $code",
)


class Executor(submitit.SlurmExecutor):
    """submitit's, which writes scripts without Slurm on PATH, too: --dry-run may be given anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def write_script_text(submission: Submission, config: LaunchConfig, code: Path, max_running: int) -> str:
    """The sbatch script for all tasks of `submission`, which runs the worker from the copy `code`."""
    python = config.python or shlex.quote(sys.executable)
    worker = f"{python} -m depthmup.launch.jobs.worker {shlex.quote(str(submission.file))}"
    one = (
        f"srun --nodes=1 --ntasks=1 {shlex.join(list_container_options(config))} {worker}"
        if config.container_image
        else worker
    )
    imports = f"export PYTHONPATH={shlex.quote(str(code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}"
    hold = [f"{one} --held && exit 0"] if config.tasks > 1 else []  # all its processes must know the same
    late = max(60 * (config.timeout_min - 1) - config.signal_delay_s, 0)  # Slurm may warn a minute early
    stopped = shlex.quote(str(submission.stopped))
    teardown = [line.format(worker=one, late=late, stopped=stopped) for line in TEARDOWN]
    return write_sbatch_text(submission, config, code, worker, teardown, max_running, [imports, *hold])


def list_container_options(config: LaunchConfig) -> list[str]:
    """srun's options for the image that the interpreter is in; none without one."""
    options = {"--container-image": config.container_image, "--container-mounts": config.container_mounts}
    return [f"{key}={value}" for key, value in options.items() if value]


def write_sbatch_text(
    submission: Submission,
    config: LaunchConfig,
    folder: Path,
    command: str,
    teardown: list[str],
    max_running: int = 1,
    before: Sequence[str] = (),
) -> str:
    """An sbatch script that runs `command` in `folder`, as an array of the submission's tasks; `before` are lines that
    come first there. Raises UserError for a folder with a % in its name: in the name of a log that is one of Slurm's
    patterns, and srun (22.05) finds no log through a path with %% for %."""
    if "%" in str(submission.path):
        raise UserError(
            f"{submission.path}: Slurm reads % in a path as a pattern: set study.directory to a path without it"
        )
    executor = Executor(folder=str(submission.path))
    executor.update_parameters(
        job_name=submission.name,
        comment="depthmup",
        partition=config.partition,
        account=config.account,
        qos=config.qos,
        constraint=config.constraint,
        time=config.timeout_min,
        nodes=config.nodes,
        ntasks_per_node=config.tasks // config.nodes,
        gpus_per_node=config.gpus_per_node or None,
        cpus_per_task=config.cpus_per_task,
        mem=f"{config.memory_gb}GB" if config.memory_gb else None,
        signal_delay_s=config.signal_delay_s,
        array_parallelism=max_running,
        stderr_to_stdout=True,
        wckey=None,
        srun_args=["--kill-on-bad-exit=1", *list_container_options(config)],
        setup=[
            *config.setup,
            *(line.format(cpus=config.cpus_per_task) for line in SETUP),
            f"cd {shlex.quote(str(folder.absolute()))}",
            *before,
        ],
        teardown=teardown,
        additional_parameters={"requeue": True, **config.sbatch},
    )
    executor.parameters["map_count"] = len(submission.tasks)  # as submitit's own map_array does
    return executor._make_submission_file_text(command, uid="")


@dataclass(frozen=True)
class Turns:
    """How the arrays of one launch, and what the study has in the queue already, keep to launch.max_running together:
    `throttles[i]` jobs of the i-th array at once, and an array beyond these when the one so many before it has ended.
    The first of all wait for the arrays `after`."""

    throttles: list[int]
    after: list[str]

    def throttle(self, number: int) -> int:
        return self.throttles[number % len(self.throttles)]

    def before(self, number: int, taken: Sequence[str]) -> list[str]:
        """The ids of the arrays that number `number` waits for; `taken` are those of this launch so far."""
        return [taken[number - len(self.throttles)]] if number >= len(self.throttles) else self.after


def take_turns(num_arrays: int, num_tasks: int, max_running: int, places_taken: int, queued: Sequence[str]) -> Turns:
    """`count_taken` by the arrays `queued`. What is left is used at once where it is half of what could be used, and
    otherwise all of it once those have ended."""
    left = max_running - places_taken
    waits = 2 * left < min(num_tasks, max_running)
    usable = max_running if waits else left
    lanes = min(num_arrays, usable)
    throttles = [usable // lanes + (lane < usable % lanes) for lane in range(lanes)]
    return Turns(throttles, list(queued) if waits else [])


def deal_tasks(tasks: Sequence[list[str]], max_array_size: int) -> list[list[list[str]]]:
    """`tasks` in as few arrays as can be, each with its share of the costly ones, which come first."""
    count = math.ceil(len(tasks) / max_array_size)
    return [list(tasks[number::count]) for number in range(count)]


def prepare_arrays(
    arrays: Sequence[list[list[str]]], turns: Turns, config: LaunchConfig, jobs: Path, name: str, code: Path
) -> list[Submission]:
    """Writes a submission with its script for every array; submits nothing."""
    keys = ("memory_gb", "timeout_min", "runs_per_gpu", "runs_per_job", "hold_after")
    submissions = []
    for number, tasks in enumerate(arrays):
        details = {**{key: getattr(config, key) for key in keys}, "throttle": turns.throttle(number)}
        submission = Submission.create(jobs.absolute(), name, tasks, details)
        write_atomically(
            submission.script, write_script_text(submission, config, code, turns.throttle(number)).encode()
        )
        submissions.append(submission)
    return submissions


def write_dry_run_script(study: Study) -> str:
    """The script of the first array that a launch now would submit; touches nothing. Raises UserError."""
    config, jobs = study.file.launch, study.file.directory.absolute() / "jobs"
    if config.cluster != "slurm":
        raise UserError(
            f"--dry-run shows an sbatch script, and launch.cluster is {config.cluster}: add --cluster slurm"
        )
    check_fits(study)
    tasks = group_packs(make_packs(study.pending(), config), config.runs_per_job)
    if not tasks:
        raise UserError("every run is done: there is nothing to submit")
    submission = Submission(jobs / f"depthmup-{study.file.study.name}-DRYRUN", tasks, {})
    code = study.file.directory / "code" / hash_sources(list_sources())
    return write_script_text(submission, config, code, config.max_running)


PATIENCE_MINUTES = 10  # for its launcher, of a job that is told later when to begin: then it begins by itself


def submit_arrays(submissions: Sequence[Submission], turns: Turns, config: LaunchConfig, lock: int) -> None:
    """Submits every array, or none: what Slurm took is cancelled when it refuses a later one, and none of it has begun
    by then. Raises UserError for a refusal, and SlurmError when Slurm stops answering: it may then have taken the first
    arrays, and the next, too."""
    taken: list[str] = []
    waits = len(submissions) > 1 and "begin" not in config.sbatch
    for number, submission in enumerate(submissions):
        before = turns.before(number, taken)
        own = config.sbatch.get("dependency")
        both = ",".join([*([str(own)] if own else []), f"afterany:{':'.join(before)}"])
        options = [f"--dependency={both}"] if before else []
        options += [f"--begin=now+{PATIENCE_MINUTES}minutes"] if waits else []
        try:
            job_id = slurm.call_sbatch(submission.script, options, pass_fds=(lock,))
        except slurm.SlurmError as error:
            # a time-out may hide that the job was taken
            ids = {task.name: task.job_id for task in slurm.read_queue((), [submission.name])}
            if submission.name not in ids:
                slurm.cancel(taken)
                refusal = slurm.describe_refusal(error)
                if isinstance(refusal, slurm.Full):
                    refusal.fits = sum(len(each.tasks) for each in submissions[:number])
                raise refusal from None
            job_id = ids[submission.name]
        submission.write_job_id(job_id)
        taken.append(job_id)
    if waits:
        slurm.begin_now(taken)


CONTINUATION_MINUTES = 60
CONTINUATION_MEMORY_GB = 4  # torch counts FLOPs, matplotlib draws
START = "import sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "
START += "from depthmup.launch.chain import main; sys.exit(main())"


def submit_continuation(study: Study, targets: Sequence[Path], after: bool, lock: int) -> Submission:
    """Submits the small job that goes on with the study, in this folder; `after`: from a search to its study. It is to
    be told after which jobs (slurm.start_after); if that does not happen it begins by itself. `lock` is that of
    `lock_launch`. Raises UserError; when Slurm stops answering, the job may be there, and is found later."""
    config, root = study.file.launch, study.file.directory.absolute()
    small = replace(
        config,
        nodes=1,
        gpus_per_node=0,
        tasks_per_node=1,
        cpus_per_task=1,
        memory_gb=CONTINUATION_MEMORY_GB,
        timeout_min=min(config.timeout_min, CONTINUATION_MINUTES),
        container_image=None,  # it calls sbatch, and runs with the interpreter that launches
        container_mounts=None,
        sbatch={**config.continuation, "begin": f"now+{PATIENCE_MINUTES}minutes"},
    )
    code = copy_code(root / "code").absolute()
    files = [str(target.absolute()) for target in targets]
    arguments = [sys.executable, "-c", START, str(code), str(root), *files, *(["--after"] if after else [])]
    details = {"targets": files, "after": after}
    submission = Submission.create(root / "jobs", f"depthmup-{study.file.study.name}-then", [[]], details)
    script = write_sbatch_text(submission, small, Path.cwd(), shlex.join(arguments), [])
    write_atomically(submission.script, script.encode())
    try:
        submit_arrays([submission], Turns([1], []), small, lock)
    except UserError as error:
        submission.write_refused(str(error))  # for `status`
        raise
    except slurm.SlurmError as error:
        raise slurm.Silent(f"Slurm does not answer: {error}. No run was submitted") from None
    return submission
