"""What runs over two nodes survive on a real Slurm: each fate of a table befalls a run of each engine, one after the
other, and the run must go on from its newest checkpoint. Several runs stand side by side, and share the fates."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest

from conftest import settings_on
from depthmup.train.reading import read_yaml
from slurm_cluster import Cluster, wait_for
from test_slurm_survival import BATCH, Job, done, events, launch, slow_down, steps

STEPS_PER_FATE = 30  # so many are made, at a second each, before one has come and is over
FIRST, LAST = 0, 1
ENGINES = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
}
LINE_SECONDS = 0.9
# A checkpoint's last rename takes a second, too. A frozen process is taken for dead after 6 s, not 60.
SLOW_SAVES = """
from depthmup.train import lock
lock.BEAT, lock.SILENCE = 1.0, 6.0
rename = os.rename
def slow_rename(source, target, **options):
    if os.path.basename(target).startswith("step-") and os.path.exists(slow):
        time.sleep(1)
    return rename(source, target, **options)
os.rename = slow_rename
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
QUICK = {"crash-first-node-in-a-save", "freeze-last-node", "stop-first-process"}  # killed ones: test_slurm_survival


@dataclass(frozen=True)
class Outcome:
    """What a fate came to: the last step and the newest checkpoint when it came, and where the run went on from."""

    reached: int
    saved: int
    went_on_from: int
    failed: dict[str, Any] | None


class Chain:
    """One run over two nodes, what is to befall it, and what has."""

    def __init__(self, cluster: Cluster, job: Job, fates: list[Fate], nodes_to_lose: threading.Semaphore) -> None:
        self.cluster, self.job, self.fates, self.nodes_to_lose = cluster, job, fates, nodes_to_lose
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

    def suffer_all(self) -> None:
        for fate in self.fates:
            self.suffer(fate)

    def suffer(self, fate: Fate) -> None:
        with self.nodes_to_lose if fate.what == "node" else nullcontext():  # first: the run goes on while it waits
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


def begin(cluster: Cluster, digits: Path, file: Path, engine: str, steps: int) -> Job:
    content = settings_on(digits)
    content["data"]["num_streams"] = BATCH
    content["train"] |= {"samples": steps * BATCH, "global_batch_size": BATCH, "log_every": 1, "checkpoint_every": 2}
    content["parallel"] = {**ENGINES[engine], "step_timeout": 8}
    place = {"nodes": 2, "tasks_per_node": 1, "cpus_per_task": WHOLE_NODE}
    content["launch"] = {"cluster": "slurm", **place, "setup": [f"export PYTHONPATH={file.parent}"]}
    return launch(cluster, file, content)


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
) -> dict[str, list[Chain]]:
    """The runs of each engine after everything that the chosen tests are about has befallen them: a run of each of
    several engines, or two of one."""
    folder = tmp_path_factory.mktemp("nodes")
    slow = slow_down(folder, LINE_SECONDS, SLOW_SAVES)
    wanted: dict[str, list[Fate]] = {}
    for item in request.session.items:
        given = getattr(item, "callspec", None)
        if given and item.fspath == request.fspath and "fate" in given.params:
            wanted.setdefault(given.params["engine"], []).append(given.params["fate"])
    nodes_to_lose = threading.Semaphore(2)  # beside the six that are in use
    runs = 2 if len(wanted) == 1 else 1
    found: dict[str, list[Chain]] = {engine: [] for engine in wanted}
    for engine, number in product(wanted, range(runs)):
        if fates := wanted[engine][number::runs]:
            steps = 50 + STEPS_PER_FATE * len(fates)
            job = begin(cluster, digits, folder / f"{engine}-{number}.yaml", engine, steps)
            found[engine].append(Chain(cluster, job, fates, nodes_to_lose))
    all_chains = list(chain.from_iterable(found.values()))
    with drained_nodes_are_resumed(cluster):
        with ThreadPoolExecutor(len(all_chains)) as threads:
            list(threads.map(Chain.suffer_all, all_chains))
        slow.unlink()
        for each in all_chains:
            wait_for(lambda each=each: done(each.run) or each.failed())
    return found


def is_quick(engine: str, fate: Fate) -> bool:
    return engine == "ddp" and str(fate) in QUICK


CASES = [
    pytest.param(engine, fate, id=f"{engine}-{fate}", marks=() if is_quick(engine, fate) else pytest.mark.long)
    for engine in ENGINES
    for fate in FATES
]


@pytest.mark.parametrize(("engine", "fate"), CASES)
def test_the_run_goes_on_from_its_newest_checkpoint(chains: dict[str, list[Chain]], engine: str, fate: Fate) -> None:
    (sufferer,) = (each for each in chains[engine] if fate in each.fates)
    outcome = sufferer.outcomes.get(str(fate))
    print(f"{engine}, {fate}: {outcome}")
    assert outcome, f"it had failed before: {sufferer.failed()}"
    assert outcome.failed is None
    assert outcome.went_on_from >= outcome.saved > 0


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp", "zero2"))])
def test_nothing_is_lost_and_no_step_is_done_twice(chains: dict[str, list[Chain]], engine: str) -> None:
    for run in (each.run for each in chains[engine]):
        assert done(run), run
        assert steps(run) == list(range(1, read_yaml(run / "config.yaml")["train"]["samples"] // BATCH + 1))
        starts = [start["step"] for start in events(run)["started"]]
        assert starts == sorted(starts)
        assert set(events(run)) <= {"started", "interrupted", "lost"}
