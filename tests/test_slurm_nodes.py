"""What runs over two nodes survive on a real Slurm: each fate of a table befalls a run of each engine, one after the
other, and the run must go on from its newest checkpoint. The runs of the engines stand side by side."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import settings_on
from depthmup.train.reading import read_yaml
from slurm_cluster import Cluster, wait_for
from test_slurm_survival import Job, done, events, launch, steps

STEPS_PER_FATE = 90  # so many are made, at a third of a second each, before one has come and is over
FIRST, LAST = 0, 1
ENGINES = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
}
# As long as the file SLOW is there, a metrics line takes a third of a second, and a checkpoint's last rename a second.
# A frozen process is taken for dead after 6 s, not 60.
PACED = """
import json, os, time
from depthmup.train import lock
lock.BEAT, lock.SILENCE = 1.0, 6.0
dumps, rename = json.dumps, os.rename
def slow_dumps(content, **options):
    if isinstance(content, dict) and "grad_norm" in content and os.path.exists({slow!r}):
        time.sleep(0.3)
    return dumps(content, **options)
def slow_rename(source, target, **options):
    if os.path.basename(target).startswith("step-") and os.path.exists({slow!r}):
        time.sleep(1)
    return rename(source, target, **options)
json.dumps, os.rename = slow_dumps, slow_rename
"""
WHOLE_NODE = 8  # CPUs


@dataclass(frozen=True)
class Fate:
    """What befalls a node or a process, by its place in the run. `crash`: Slurm is told at once; `kill`: it finds out;
    `stop` of a node: its slurmd alone dies, and of a process: it hangs."""

    action: str
    what: str
    place: int
    in_a_save: bool = False

    def __str__(self) -> str:
        where = "first" if self.place == FIRST else "last"
        return f"{self.action}-{where}-{self.what}" + ("-in-a-save" if self.in_a_save else "")


FATES = [
    *(Fate(action, "node", place) for action in ("crash", "kill", "freeze", "stop") for place in (LAST, FIRST)),
    *(Fate(action, "process", place) for action in ("kill", "stop") for place in (LAST, FIRST)),
    *(Fate("kill", "process", place, in_a_save=True) for place in (LAST, FIRST)),
    *(Fate("crash", "node", place, in_a_save=True) for place in (LAST, FIRST)),
]
QUICK = {"crash-last-node", "crash-first-node-in-a-save", "freeze-last-node", "kill-last-process", "stop-first-process"}


@dataclass(frozen=True)
class Outcome:
    """What a fate came to: the last step and the newest checkpoint when it came, and where the run went on from."""

    reached: int
    saved: int
    went_on_from: int
    failed: dict[str, Any] | None


class Chain:
    """One run over two nodes, and what has befallen it."""

    def __init__(self, cluster: Cluster, job: Job, nodes_to_lose: threading.Semaphore) -> None:
        self.cluster, self.job, self.nodes_to_lose = cluster, job, nodes_to_lose
        self.run = job.runs[0]
        self.outcomes: dict[str, Outcome] = {}

    def starts(self) -> list[dict[str, Any]]:
        return events(self.run).get("started", [])

    def saved(self) -> int:
        found = (int(path.name.removeprefix("step-")) for path in self.run.glob("checkpoints/step-*"))
        return max(found, default=0)

    def failed(self) -> dict[str, Any] | None:
        file = self.run / "failed.json"
        return json.loads(file.read_text()) if file.exists() else None

    def nodes(self) -> list[str]:
        return self.cluster.call("scontrol", "show", "hostnames", self.cluster.node_of(self.job.element(0))).split()

    def process(self, place: int) -> int:
        """Process id of that rank's worker."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            except OSError:
                continue
            words = (f"SLURM_ARRAY_JOB_ID={self.job.job_id}", f"SLURM_PROCID={place}", "SLURM_STEP_ID=0")
            is_worker = b"launch.jobs.worker" in command and b"--" not in command and b"srun" not in command
            if is_worker and all(f"{word}\0".encode() in environment for word in words):
                return int(process.name)
        raise LookupError(f"no worker {place} of {self.job.file.stem}")

    def is_down(self, node: str) -> bool:
        return "down" in self.cluster.call("sinfo", "-h", "-n", node, "-o", "%T")

    def wait_for_progress(self) -> None:
        """Until the present start has saved: what comes then must cost no step before it."""
        wait_for(lambda: self.failed() or (self.starts() and self.saved() > self.starts()[-1]["step"]))
        wait_for(lambda: self.failed() or steps(self.run)[-1] > self.saved())

    def go_on(self, before: int) -> bool:
        """Whether the run has begun again, or has ended."""
        return len(self.starts()) > before or self.failed() is not None

    def suffer(self, fate: Fate) -> None:
        self.wait_for_progress()
        if self.failed():
            return
        if fate.in_a_save:
            wait_for(lambda: self.failed() or list(self.run.glob("checkpoints/tmp-step-*")))
        before, reached, saved = len(self.starts()), steps(self.run)[-1], self.saved()
        if fate.what == "process":
            os.kill(self.process(fate.place), signal.SIGKILL if fate.action == "kill" else signal.SIGSTOP)
            wait_for(lambda: self.go_on(before))
        else:
            with self.nodes_to_lose:
                self.lose_a_node(fate, self.nodes()[fate.place], before)
        self.outcomes[str(fate)] = Outcome(reached, saved, self.starts()[-1]["step"], self.failed())

    def lose_a_node(self, fate: Fate, node: str, before: int) -> None:
        """And gives it back."""
        self.cluster.node(fate.action, node)
        if fate.action in ("kill", "stop"):
            wait_for(lambda: self.is_down(node))
        if fate.action in ("freeze", "stop"):
            wait_for(lambda: self.go_on(before))  # while the old processes are still there
        self.cluster.node("thaw" if fate.action == "freeze" else "start", node)
        wait_for(lambda: self.go_on(before))
        wait_for(lambda: not self.is_down(node))


def begin(cluster: Cluster, digits: Path, folder: Path, engine: str, steps: int) -> Job:
    content = settings_on(digits)
    content["train"] |= {"samples": steps * 32, "log_every": 1, "checkpoint_every": 5}
    content["parallel"] = {**ENGINES[engine], "step_timeout": 8}
    place = {"nodes": 2, "tasks_per_node": 1, "cpus_per_task": WHOLE_NODE}
    content["launch"] = {"cluster": "slurm", **place, "setup": [f"export PYTHONPATH={folder}"]}
    return launch(cluster, folder / f"{engine}.yaml", content)


@contextmanager
def drained_nodes_are_resumed(cluster: Cluster) -> Iterator[None]:
    """As an administrator does: Slurm drains a node where a step of a lost run is not gone in time."""
    ended = threading.Event()

    def resume() -> None:
        while not ended.wait(2):
            for line in cluster.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
                node, state = line.split()
                if "drain" in state:
                    cluster.call("scontrol", "update", f"nodename={node}", "state=resume", root=True)

    administrator = threading.Thread(target=resume)
    administrator.start()
    try:
        yield
    finally:
        ended.set()
        administrator.join()


@pytest.fixture(scope="module")
def chains(
    cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Chain]:
    """The runs after everything that the chosen tests are about has befallen them."""
    folder = tmp_path_factory.mktemp("nodes")
    slow = folder / "slow"
    slow.touch()
    (folder / "sitecustomize.py").write_text(PACED.format(slow=str(slow)))
    wanted: dict[str, list[Fate]] = {}
    for item in request.session.items:
        given = getattr(item, "callspec", None)
        if given and item.fspath == request.fspath and "fate" in given.params:
            wanted.setdefault(given.params["engine"], []).append(given.params["fate"])
    nodes_to_lose = threading.Semaphore(2)  # beside the six that are in use
    found = {}
    for engine, fates in wanted.items():
        job = begin(cluster, digits, folder, engine, 150 + STEPS_PER_FATE * len(fates))
        found[engine] = Chain(cluster, job, nodes_to_lose)

    def suffer_all(engine: str) -> None:
        for fate in wanted[engine]:
            found[engine].suffer(fate)

    with drained_nodes_are_resumed(cluster):
        with ThreadPoolExecutor(len(found)) as threads:
            list(threads.map(suffer_all, found))
        slow.unlink()
        for chain in found.values():
            wait_for(lambda chain=chain: done(chain.run) or chain.failed())
    return found


def is_quick(engine: str, fate: Fate) -> bool:
    return engine == "ddp" and str(fate) in QUICK


CASES = [
    pytest.param(engine, fate, id=f"{engine}-{fate}", marks=() if is_quick(engine, fate) else pytest.mark.long)
    for engine in ENGINES
    for fate in FATES
]


@pytest.mark.parametrize(("engine", "fate"), CASES)
def test_the_run_goes_on_from_its_newest_checkpoint(chains: dict[str, Chain], engine: str, fate: Fate) -> None:
    outcome = chains[engine].outcomes.get(str(fate))
    print(f"{engine}, {fate}: {outcome}")
    assert outcome, f"it had failed before: {chains[engine].failed()}"
    assert outcome.failed is None
    assert outcome.went_on_from >= outcome.saved > 0


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp", "zero2"))])
def test_nothing_is_lost_and_no_step_is_done_twice(chains: dict[str, Chain], engine: str) -> None:
    run = chains[engine].run
    assert done(run), chains[engine].failed()
    assert steps(run) == list(range(1, read_yaml(run / "config.yaml")["train"]["samples"] // 32 + 1))
    starts = [start["step"] for start in events(run)["started"]]
    assert starts == sorted(starts)
    assert set(events(run)) <= {"started", "interrupted", "lost"}
