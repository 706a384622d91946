"""Runs of several processes as a cluster treats them: signals, dead processes, other world sizes, bad set-ups."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthmup.train import __main__ as command
from depthmup.train import lock
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.distributed import World, describe_lost_peer, read_first_host, read_world_from_environment
from depthmup.train.lock import Holder, find_holder, take_lock
from depthmup.train.reading import to_yaml
from depthmup.train.rundir import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_LOST_PEER,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    RunDirectory,
)
from train_configs import metric, pack_digits, run_config, timeless_metrics
from train_processes import Process, environment, start

STEPS = 40
OVERRIDES = ("optimizer.name=adamw", "optimizer.lr=0.002", "train.clip_norm=1", "train.checkpoint_every=5")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps as a YAML file."""
    directory = tmp_path_factory.mktemp("processes")
    path = directory / "run.yaml"
    shards = pack_digits(directory / "shards")
    path.write_text(to_yaml(run_config(shards, f"train.samples={STEPS * 32}", *OVERRIDES)))
    return path


def train(config: Path, directory: Path, *overrides: str, world_size: int = 1) -> list[Process]:
    return start(["-m", "depthmup.train", str(config), str(directory), *overrides], world_size)


def wait_for_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (line := RunDirectory(directory).read_last_metrics()) and line["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{directory} did not reach step {step}")


def finish(processes: Sequence[Process], timeout: float = 300) -> tuple[list[int], str]:
    """(exit codes, everything that was printed)."""
    try:
        output = "".join(process.communicate(timeout=timeout)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def losses(directory: Path) -> list[float]:
    assert metric(directory, "step") == list(range(1, STEPS + 1))
    return metric(directory, "loss")


def test_the_fork_server_has_done_what_each_of_its_processes_would_need_seconds_for() -> None:
    """It leaves out silently what is optional."""
    there = "sys.modules.keys() >= {'deepspeed', 'scipy.stats', 'hypothesis', 'optuna', 'sklearn.datasets'}"
    known = "owner.fingerprint_code.cache_info().currsize, packed_digits.cache_info().currsize"
    program = "import gc, sys; from depthmup.train import owner; "
    program += f"from train_configs import packed_digits; print({there}, {known}, gc.get_freeze_count() > 1e5)"
    (process,) = start(["-c", program], world_size=1)
    assert finish([process]) == ([0], "True 1 3 True\n")


def test_stopped_and_killed_runs_go_on_with_other_engines_and_world_sizes(config: Path, tmp_path: Path) -> None:
    """fsdp x 4 in two copies, SIGUSR2 to one process -> ZeRO 2 x 2, one process killed -> ddp x 2, SIGTERM -> one."""
    processes = train(config, tmp_path, "parallel.engine=fsdp", "parallel.shard_size=2", world_size=4)
    wait_for_step(tmp_path, 7)
    processes[1].send_signal(signal.SIGUSR2)
    codes, output = finish(processes)
    assert codes == [EXIT_REQUEUE] * 4, output
    assert "as asked" in output
    saved = max((tmp_path / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    passed = sum(32 / rate for rate in metric(tmp_path, "images_per_second"))
    assert json.loads((saved / "state.json").read_text())["seconds"] > 1.5 * passed  # of four processes

    processes = train(config, tmp_path, "parallel.engine=deepspeed", world_size=2)
    wait_for_step(tmp_path, 14)
    processes[1].kill()
    codes, output = finish(processes)
    assert codes == [EXIT_LOST_PEER, -signal.SIGKILL], output
    lost = RunDirectory(tmp_path).lost()
    assert lost
    assert lost["rank"] == 0
    assert "another process is gone" in lost["error"]
    assert "Traceback" in (tmp_path / "log-0.txt").read_text()
    assert RunDirectory(tmp_path).failed() is None

    processes = train(config, tmp_path, "parallel.engine=ddp", world_size=2)
    wait_for_step(tmp_path, 21)
    processes[0].send_signal(signal.SIGTERM)
    codes, output = finish(processes)
    assert codes == [EXIT_REQUEUE, EXIT_REQUEUE], output

    codes, output = finish(train(config, tmp_path))
    assert codes == [EXIT_DONE], output
    assert RunDirectory(tmp_path).lost() is None
    log = (tmp_path / "log-0.txt").read_text()
    assert log.count("resumed from step-") == 3

    whole = tmp_path / "whole"
    assert finish(train(config, whole))[0] == [EXIT_DONE]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-3)  # 40 steps of Adam widen 1e-7 of rounding


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("engine", "rank"), [("fsdp", 0), pytest.param("ddp", 1, marks=LONG), pytest.param("deepspeed", 1, marks=LONG)]
)
def test_a_run_of_two_processes_of_which_one_is_killed_ends_bit_for_bit_as_one_that_was_not(
    engine: str, rank: int, config: Path, tmp_path: Path
) -> None:
    overrides = (f"parallel.engine={engine}", "train.samples=640", "train.checkpoint_every=4", "model.norm=batch")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    processes = train(config, killed, *overrides, world_size=2)
    wait_for_step(killed, 5 + int(time.time()) % 8)  # of 20
    while not RunDirectory(killed).list_checkpoint_steps():
        time.sleep(0.01)
    processes[rank].kill()
    codes, output = finish(processes)
    assert sorted(codes) == [-signal.SIGKILL, EXIT_LOST_PEER], output
    for directory in (killed, whole):
        codes, output = finish(train(config, directory, *overrides, world_size=2))
        assert codes == [EXIT_DONE] * 2, output
    assert "resumed from step-" in (killed / "log-0.txt").read_text()
    assert timeless_metrics(killed) == timeless_metrics(whole)
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_a_run_that_another_process_trains_is_left_alone(config: Path, tmp_path: Path) -> None:
    (first,) = train(config, tmp_path, f"train.samples={10**6}")
    wait_for_step(tmp_path, 3)
    codes, output = finish(train(config, tmp_path, f"train.samples={10**6}"))
    assert codes == [EXIT_USER_ERROR], output
    assert output.splitlines()[-1] == (
        f"error: {tmp_path}: process {first.pid} on {socket.gethostname()} trains it: wait for it, or end it"
    )
    assert not RunDirectory(tmp_path).failed()
    first.send_signal(signal.SIGTERM)
    assert finish([first])[0] == [EXIT_REQUEUE]


def test_whoever_looks_for_a_locks_holder_does_not_keep_a_worker_from_taking_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, looking.close).start()
        held = take_lock(path)
    assert held
    assert find_holder(path) == Holder(socket.gethostname(), os.getpid())
    assert take_lock(path) is None
    held.close()
    assert find_holder(path) is None


def test_a_lock_that_other_hosts_do_not_see_keeps_them_out_while_its_holder_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on BeeGFS: flock succeeds on every host."""
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path, here = tmp_path / "lock", socket.gethostname()
    held = take_lock(path)
    assert held
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another")
        assert take_lock(path) is None
        assert find_holder(path) == Holder(here, os.getpid())
        held.ended.set()  # as after a kill
        elsewhere.setattr(lock, "SILENCE", 0.5)
        time.sleep(0.1)
        held = take_lock(path)
        assert held
    assert find_holder(path) == Holder("another", os.getpid())
    held.close()
    assert find_holder(path) is None
    started = take_lock(path)
    assert started  # at once, as nobody is named
    started.close()


def test_a_holder_that_is_frozen_with_its_host_loses_the_lock_and_ends_once_it_thaws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system keeps its flock. Two may wait for it: one gets it."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    path = tmp_path / "lock"
    frozen = take_lock(path)
    assert frozen
    frozen.ended.set()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another")
        taken: list[lock.Lock | None] = []
        both = [threading.Thread(target=lambda: taken.append(take_lock(path))) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        held = [one for one in taken if one]
        assert len(held) == 1
        assert not held[0].is_lost
        assert find_holder(path) == Holder("another", os.getpid())
    assert frozen.is_lost
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: (ended.append(code), frozen.ended.set()))
    monkeypatch.setattr(frozen, "ended", threading.Event())
    frozen.beat()
    assert ended == [EXIT_LOST_PEER]
    held[0].close()


def test_of_two_that_saw_the_same_silent_holder_only_the_first_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("")
    seen = path.stat()
    first = lock.put_in_place(path, seen)
    assert first
    assert lock.put_in_place(path, seen) is None
    first.close()


def gloo(words: str) -> RuntimeError:
    return RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] {words}")


def test_only_what_the_network_between_the_processes_says_is_the_loss_of_another_process() -> None:
    world = World(rank=1, size=2)
    assert "is gone" in str(describe_lost_peer(gloo("Connection closed by peer [127.0.0.1]:5"), world))
    assert "does not answer" in str(describe_lost_peer(gloo("Timed out waiting 2000ms for recv operation"), world))
    wrapped = RuntimeError("in the thread that saves")
    wrapped.__cause__ = gloo("Connection reset by peer")
    assert describe_lost_peer(wrapped, world)
    remote = "NCCL error: remote process exited or there was a network error"
    assert describe_lost_peer(torch.distributed.DistBackendError(remote), world)
    assert describe_lost_peer(torch.distributed.DistNetworkError("The client socket has timed out"), world)
    for error in (
        ConnectionResetError("Connection reset by peer"),  # of a store of images
        RuntimeError("Connection reset by peer"),
        RuntimeError("DataLoader timed out after 30 seconds"),
        torch.distributed.DistBackendError("NCCL error: invalid usage: Duplicate GPU detected"),
        ValueError("gloo"),
    ):
        assert describe_lost_peer(error, world) is None, error


def test_a_file_system_without_locks_is_said_in_one_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert command.train(command.read_config(config, []), RunDirectory(tmp_path / "run")) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert "this file system has no file locks" in line


def test_a_process_that_hangs_ends_the_others_within_the_time_out(config: Path, tmp_path: Path) -> None:
    """Also in the groups that an engine makes for itself: DeepSpeed's wait for half an hour unless they are told."""
    overrides = ("parallel.engine=deepspeed", "parallel.step_timeout=2", f"train.samples={10**6}")
    first, hanging = train(config, tmp_path, *overrides, world_size=2)
    try:
        wait_for_step(tmp_path, 3)
        hanging.send_signal(signal.SIGSTOP)
        codes, output = finish([first], timeout=60)
    finally:
        hanging.kill()
    assert codes == [EXIT_LOST_PEER], output
    lost = RunDirectory(tmp_path).lost()
    assert lost
    assert "another process does not answer" in lost["error"]
    assert RunDirectory(tmp_path).failed() is None


def test_bad_samples_of_all_processes_together_end_the_run_everywhere(config: Path, tmp_path: Path) -> None:
    """Judged alone, the process that reads the 8 bad samples of 1408 would have 1.1 % of them, and the other none."""
    index = pack_digits(tmp_path / "shards", validation_share=0.2)
    path = sorted(index.glob("train*.index.npz"))[6]
    with np.load(path) as arrays:
        members = dict(arrays)
    members["labels"][:8] = -1
    np.savez(path, **members)
    data = [f"data.root={index}", "data.minival=0", "train.samples=1600", "parallel.engine=ddp"]
    codes, output = finish(train(config, tmp_path / "run", *data, "data.max_bad_fraction=0.0045", world_size=2))
    assert codes == [EXIT_USER_ERROR] * 2, output
    assert len(re.findall(r"[78] of 1408 samples are bad, more than data\.max_bad_fraction", output)) == 1, output
    last = RunDirectory(tmp_path / "run").read_last_metrics()
    assert last
    assert last["bad_samples"] == last[f"bad_samples/{path.name[:12]}.tar/no whole number in a member .cls"] >= 7
    codes, output = finish(train(config, tmp_path / "allowed", *data, "data.max_bad_fraction=0.006", world_size=2))
    assert codes == [EXIT_DONE] * 2, output


def children(process: Process | subprocess.Popen[str]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, f"{processes} are still there"
        time.sleep(0.05)


def test_a_signal_to_every_process_of_a_job_stops_the_run_and_its_data_workers(config: Path, tmp_path: Path) -> None:
    """As Slurm, a batch system or a terminal sends it: the workers of training and of evaluation get it too, and must
    not die of it first."""
    overrides = (f"train.samples={10**6}", "data.num_workers=2", "train.evaluate_every=2")
    (process,) = train(config, tmp_path, *overrides)
    wait_for_step(tmp_path, 3)
    workers = children(process)
    assert len(workers) >= 2
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    codes, output = finish([process])
    assert codes == [EXIT_REQUEUE], output
    assert "as asked" in output
    assert "killed by signal" not in output
    assert RunDirectory(tmp_path).list_checkpoint_steps()
    wait_until_gone(workers)


def test_data_workers_are_children_of_the_process_that_trains_whatever_pythons_default_is(
    config: Path, tmp_path: Path
) -> None:
    """From 3.14 on it is a fork server, as in the processes that `train` starts here."""
    (process,) = train(config, tmp_path, f"train.samples={10**6}", "data.num_workers=2", "train.evaluate=[]")
    wait_for_step(tmp_path, 3)
    workers = children(process)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    codes, output = finish([process])
    assert codes == [EXIT_REQUEUE], output
    wait_until_gone(workers)


def test_a_second_ctrl_c_ends_the_run_at_once_and_its_data_workers_too(config: Path, tmp_path: Path) -> None:
    """Not forked: multiprocessing would catch what the second raises."""
    overrides = (f"train.samples={10**6}", "data.num_workers=2", "train.evaluate_every=1")
    command = [sys.executable, "-m", "depthmup.train", str(config), str(tmp_path), *overrides]
    with subprocess.Popen(command, env=environment(0, 1, 1), text=True, stdout=subprocess.PIPE) as process:
        wait_for_step(tmp_path, 3)
        workers = children(process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        output, _ = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, EXIT_REQUEUE), output  # the second may come after the run's end
    wait_until_gone(workers)


PRESSES_TWICE = """
import os, signal, time
from depthmup.train.interrupt import Interrupt

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # the signal is seen here at the latest

class PressesWhenFreed:
    __del__ = lambda self: press()

with Interrupt.on_signals(signal.SIGINT) as interrupt:
    press()
    assert interrupt.requested
    {meanwhile}
    time.sleep(60)
"""
DROPPED = {
    "before a fork": "os.register_at_fork(before=press); os.fork() or os._exit(0)",
    "after a fork": "os.register_at_fork(after_in_parent=press); os.fork() or os._exit(0)",
    "in a destructor": "PressesWhenFreed()",
    "in both": "os.register_at_fork(before=press, after_in_parent=PressesWhenFreed); os.fork() or os._exit(0)",
}


@pytest.mark.parametrize("meanwhile", DROPPED.values(), ids=DROPPED)
def test_a_second_ctrl_c_ends_the_run_also_where_python_drops_what_it_raises(meanwhile: str) -> None:
    code = PRESSES_TWICE.format(meanwhile=meanwhile)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGINT, done.stderr


def test_a_run_that_diverges_on_two_processes_ends_on_both_and_says_where(config: Path, tmp_path: Path) -> None:
    overrides = ("optimizer.name=sgd", "optimizer.lr=1e30", "train.clip_norm=null", "train.log_every=5")
    codes, output = finish(train(config, tmp_path, *overrides, world_size=2))
    assert codes == [EXIT_DIVERGED, EXIT_DIVERGED], output
    done = RunDirectory(tmp_path).done()
    assert done
    assert done["outcome"] == "diverged"
    assert 1 <= done["step"] <= 10
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_port_in_use_and_other_mistakes_end_with_one_line_and_exit_2(config: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["-m", "depthmup.train", str(config), str(tmp_path), "parallel.init_timeout=5"]
        codes, output = finish([Process(command, environment(0, 2, port))])
    assert codes == [EXIT_USER_ERROR], output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"localhost:{port} is used by another program: set MASTER_PORT" in errors[0]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "directory", "root"),
    [
        (["data.root=/images/here", "seed=1"], None, "/images/here"),
        (["runs/lr=0.1", "data.root=/images/here"], "runs/lr=0.1", "/images/here"),
        (["elsewhere"], "elsewhere", None),
    ],
)
def test_overrides_may_follow_the_config_without_a_directory(
    config: Path, arguments: list[str], directory: str | None, root: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[RunConfig, RunDirectory]] = []
    monkeypatch.setattr(command, "train", lambda *given: seen.append(given))
    monkeypatch.setattr(command, "leave", lambda code: None)
    monkeypatch.setattr(sys, "argv", ["train", str(config), *arguments])
    command.main()
    ((found, place),) = seen
    assert place.path == Path(directory or f"runs/{run_hash(found)}")
    assert root in (None, found.data.root)


def test_whichever_process_fails_first_says_why_also_after_an_earlier_failure(config: Path, tmp_path: Path) -> None:
    """torchrun stops all others as soon as one ends, so the first process cannot be left to say it."""
    RunDirectory(tmp_path).write_failed({"error": "of the last start"})
    os.utime(tmp_path / "failed.json", (0, 0))
    codes, output = finish([Process(["-m", "depthmup.train", str(config), str(tmp_path)], environment(1, 3, 1))])
    assert codes == [EXIT_USER_ERROR]
    assert "error: train.global_batch_size 32 must be a multiple of the 3 processes: use 30 or 33" in output


def test_the_processes_of_torchrun_and_srun_are_recognised() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert read_world_from_environment(torchrun) == World(3, 8, 1, "a", 7)
    srun = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12"}
    world = read_world_from_environment({**srun, "SLURM_STEP_NODELIST": "gpu[03-04,9],cpu1"})
    assert (world.rank, world.size, world.local_rank, world.host) == (5, 8, 1, "gpu03")
    starts = [{**srun, "SLURM_RESTART_COUNT": str(count)} for count in (1, 2)] + [{**srun, "SLURM_JOB_ID": "13"}]
    assert (
        len({world.port, *(read_world_from_environment(each).port for each in starts)}) == 4
    )  # none waits for another's
    ports = {read_world_from_environment({**srun, "SLURM_JOB_ID": str(job)}).port for job in range(59603000, 59604000)}
    assert 20000 <= min(ports) <= max(ports) < 32768  # Linux gives those above to any connection
    assert read_world_from_environment({**srun, "SLURM_NTASKS": "1"}) == World()
    in_a_shell = {**srun, "SLURM_STEP_ID": str(2**32 - 6), "SLURM_STEP_NUM_TASKS": "1"}  # salloc's, of a job with eight
    assert read_world_from_environment(in_a_shell) == World()
    assert read_world_from_environment({**srun, "SLURM_STEP_NUM_TASKS": "6"}).size == 6  # srun -n 6 in that job
    assert read_world_from_environment({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}) == World()  # in no step
    assert read_world_from_environment({}) == World()
    assert [read_first_host(nodes) for nodes in ("a1", "a1,b2", "a[7,9]-ib", "n[001-128]")] == [
        "a1",
        "a1",
        "a7-ib",
        "n001",
    ]
