"""The few things that Slurm is asked or told. Nothing here uses sacct: accounting may be missing or late."""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from depthmup.data.errors import UserError

GONE = "invalid job id"
SECONDS = 60  # that one command may take; slurmctld may be busy or restarting

RETRIES = "sleeping and retrying"  # sbatch's words when the whole queue is full (MaxJobCount): it tries for two minutes
# slurmctld was away for a moment
AWAY = r"unable to contact|timed out|zero bytes|connection refused|communication|gave no answer"
# no place for so many jobs of this user, account or QOS, or of all users
FULL = rf"\w*(MaxSubmit|GrpSubmit)\w*|too many jobs|{RETRIES}|temporarily unavailable"

# sbatch's own words -> the key to change
HINTS = (
    (r"invalid partition|partition.*(not available|invalid)|not permitted to use partition", "launch.partition"),
    (r"invalid account|account/partition combination", "launch.account"),
    (r"invalid qos", "launch.qos"),
    (r"invalid feature|invalid constraint", "launch.constraint"),
    # Which limit of an account or QOS it is, Slurm says in one word; "size and/or time limits" follows each of them.
    (r"\w*(MaxWall|GrpWall)\w*", "launch.timeout_min"),
    (r"(QOS|Assoc)(Grp|Max|Min)\w+", "launch.nodes, gpus_per_node, cpus_per_task or memory_gb, or launch.qos"),
    (r"accounting/QOS policy", "launch.qos or launch.account (sacctmgr show qos, assoc lists their limits)"),
    (r"time limit", "launch.timeout_min"),
    (r"memory specification|memory required", "launch.memory_gb"),
    (r"generic resource|gres|gpu", "launch.gpus_per_node"),
    (r"(more processors|cpu count).*", "launch.cpus_per_task"),
    (r"node configuration is not available|node count", "launch.nodes, gpus_per_node, cpus_per_task or memory_gb"),
    (r"job array", "launch.runs_per_job (fewer, longer jobs)"),
    (r"submit limit|job limit", "launch.runs_per_job (fewer, longer jobs)"),
)


# squeue's words for what a job does. With any other it ends: COMPLETING, STAGE_OUT, or what it then has ended with.
WAITS = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
BOOTS = ("CONFIGURING", "POWER_UP_NODE")
RUNS = ("RUNNING", "RESIZING", "SIGNALING")
SUSPENDED = ("SUSPENDED", "STOPPED")


class SlurmError(Exception):
    """A Slurm command failed. `lines` are its own words; the last of them is what ended it."""

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class Silent(UserError):
    """Slurm does not answer now; the same command goes on once it does."""


class Full(UserError):
    """Slurm takes no more jobs from this user now; it does once some have ended. `fits`: the tasks that it had taken of
    those that it was given, before they were taken back."""

    fits = 0


@dataclass(frozen=True)
class QueuedTask:
    """One array element that has not ended."""

    job_id: str  # of the array
    index: int
    state: str  # Slurm's word: PENDING, CONFIGURING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    name: str  # of the job
    restarts: int = 0  # how often it was requeued

    def __str__(self) -> str:
        return f"job {self.element}"

    @property
    def element(self) -> str:
        """'4711_3', as Slurm calls it, and as the job calls itself in attempts.jsonl."""
        return f"{self.job_id}_{self.index}"

    @property
    def waits(self) -> bool:
        return self.state in WAITS

    @property
    def boots(self) -> bool:
        """It has nodes, and no process there yet: they are switched on for it."""
        return self.state in BOOTS

    @property
    def runs(self) -> bool:
        return self.state in RUNS

    @property
    def is_suspended(self) -> bool:
        """Its processes are there, and stopped."""
        return self.state in SUSPENDED

    @property
    def ends(self) -> bool:
        """Its processes are told to end, or have ended: it leaves the queue, or waits in it again."""
        return not (self.waits or self.boots or self.runs or self.is_suspended)


def describe_missing(name: str) -> str | None:
    """What to say where the command is not there."""
    if shutil.which(name):
        return None
    return f"no {name} on PATH (log in to a node of the cluster, or use --cluster local)"


def require_slurm() -> None:
    """Raises UserError where Slurm's commands are not there."""
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        if problem := describe_missing(name):
            raise UserError(problem)


def clean_environment() -> dict[str, str]:
    """Ours without the variables of a job that we may run in, which sbatch would take for options, and without a user's
    own formats and filters of squeue."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "SBATCH_", "SQUEUE_")) or key == "SLURM_CONF"
    }


def call_slurm(*command: str) -> str:
    """Standard output of a Slurm command. Raises SlurmError when it fails, or is not there."""
    if problem := describe_missing(command[0]):
        raise SlurmError(problem)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=clean_environment())
    except subprocess.TimeoutExpired:
        raise describe_unanswered(command[0]) from None
    if done.returncode:
        raise describe_failure(command[0], done.stderr, done.returncode)
    return done.stdout


def describe_unanswered(name: str) -> SlurmError:
    return SlurmError(f"{name} gave no answer in {SECONDS} s")


def describe_failure(name: str, said: str, code: int) -> SlurmError:
    words = [line.strip() for line in said.splitlines() if line.strip()]
    return SlurmError(*(words or [f"{name} ended with {code}"]))


def read_queue(job_ids: Sequence[str], names: Sequence[str] = ()) -> list[QueuedTask]:
    """The array elements that have not ended, of the jobs `job_ids` and of those called `names`, whoever submitted
    them: one call each, whatever their number. Raises SlurmError."""
    return ask_queue("jobs", job_ids) + ask_queue("name", names)


def ask_queue(option: str, wanted: Sequence[str]) -> list[QueuedTask]:
    if not wanted:
        return []
    # Longer words are cut: a job's name is at most as long as that of a folder.
    fields = "ArrayJobID:20|,ArrayTaskID:12|,State:20|,Reason:120|,RestartCnt:12|,Name:255"
    try:
        lines = call_slurm("squeue", "--noheader", "--array", f"--{option}={','.join(wanted)}", f"--Format={fields}")
    except SlurmError as error:
        if GONE in str(error).lower():  # of one job alone, squeue says so; of several it shows the others
            return []
        raise
    found = []
    for line in lines.splitlines():
        job_id, index, state, reason, restarts, name = map(str.strip, line.split("|", 5))
        found.append(QueuedTask(job_id, int(index) if index.isdigit() else 0, state, reason, name, int(restarts)))
    return found


def read_configuration() -> dict[str, str]:
    """Slurm's own configuration. Raises SlurmError."""
    return dict(re.findall(r"^(\w+)\s*= (\S+)", call_slurm("scontrol", "show", "config"), re.MULTILINE))


def has_private_jobs() -> bool:
    """Whether squeue shows a user their own jobs only. Raises SlurmError."""
    return "jobs" in read_configuration().get("PrivateData", "").split(",")


def ask_max_array_size() -> int:
    """Elements that one array may have. Raises SlurmError, and UserError where there may be no arrays."""
    known = read_configuration()
    size = int(known.get("MaxArraySize", 1001))  # Slurm's default
    if tasks := re.search(r"max_array_tasks=(\d+)", known.get("SchedulerParameters", "")):
        size = min(size, int(tasks[1]))
    if size < 1:
        raise UserError(
            "this cluster takes no job arrays (MaxArraySize=0 in its slurm.conf): depthmup needs them there"
        )
    return size


def call_sbatch(script: Path, options: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> str:
    """Submits `script`; returns the job id. Raises SlurmError, at once where the queue is full: sbatch itself would try
    again for two minutes."""
    if problem := describe_missing("sbatch"):
        raise SlurmError(problem)
    with subprocess.Popen(
        ["sbatch", "--parsable", *options, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        pass_fds=pass_fds,
    ) as running:
        assert running.stdout
        assert running.stderr
        late = threading.Timer(SECONDS, running.kill)
        late.start()
        said = ""
        for line in running.stderr:
            said += line
            if RETRIES in line:
                running.kill()  # it sleeps
        answer = running.stdout.read()
    late.cancel()
    if running.returncode == -signal.SIGKILL and RETRIES not in said:
        raise describe_unanswered("sbatch")
    if running.returncode:
        raise describe_failure("sbatch", said, running.returncode)
    return answer.strip().split(";")[0]


def start_after(job_id: str, others: Sequence[str]) -> None:
    """Lets a job that waits begin once `others` have ended, however they end. Raises SlurmError."""
    call_slurm("scontrol", "update", f"JobId={job_id}", f"Dependency=afterany:{':'.join(others)}", "StartTime=now")


def begin_now(job_ids: Sequence[str]) -> None:
    """Lets jobs that were to begin later begin. Raises SlurmError."""
    call_slurm("scontrol", "update", f"JobId={','.join(job_ids)}", "StartTime=now")


def cancel(job_ids: Sequence[str]) -> None:
    if job_ids:
        call_slurm("scancel", *job_ids)


UNWELL = re.compile(r"DOWN|FAIL|NOT_RESPONDING|UNKNOWN|ERROR|\*")


def list_failed_nodes(nodes: str, since: float) -> list[str]:
    """Those of `nodes`, in Slurm's short form, that are down or do not answer, or whose slurmd has begun again after
    `since` (seconds since the epoch): it kills what it finds. None where Slurm cannot be asked."""
    try:
        lines = call_slurm("scontrol", "show", "node", nodes, "--oneliner").splitlines()
    except SlurmError:  # as in a container
        return []
    failed = []
    for line in lines:
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        try:
            began = datetime.fromisoformat(fields.get("SlurmdStartTime", "")).timestamp()
        except ValueError:  # None, of one that is down
            began = 0.0
        if UNWELL.search(fields.get("State", "")) or began > since:
            failed.append(fields["NodeName"])
    return failed


def describe_silence(words: str, job_ids: Sequence[str]) -> Silent:
    """What to say when Slurm stopped answering before the job was submitted that goes on after `job_ids`."""
    jobs = f" The runs wait or run as jobs {', '.join(job_ids)}." if job_ids else ""
    return Silent(
        f"Slurm stopped answering: {words}.{jobs} Give the same command again once it answers: it adds the job that "
        "goes on after the runs"
    )


def describe_refusal(error: SlurmError) -> UserError:
    """What sbatch said, and which key to change."""
    words = re.sub(r"(sbatch|allocation failure|error): ", "", str(error))
    if re.search(FULL, words, re.IGNORECASE):
        return Full(
            f"Slurm takes no more jobs now: {words} (it does once jobs of yours, or of those who share the limit, have "
            "ended; or change launch.qos or launch.account)"
        )
    if re.search(AWAY, words, re.IGNORECASE):
        return Silent(f"Slurm did not answer for a moment: {words}. Nothing was submitted")
    key = next((key for pattern, key in HINTS if re.search(pattern, words, re.IGNORECASE)), None)
    return UserError(f"Slurm refuses the job: {words}" + (f" (change {key})" if key else ""))
