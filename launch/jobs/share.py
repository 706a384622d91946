"""How much of a study's time is over: what runs take is learned from those that ran, starts of processes included."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from statistics import fmean

from depthmup.launch.config import Size
from depthmup.launch.jobs import states
from depthmup.launch.jobs.attempts import read_attempts
from depthmup.launch.jobs.states import RunState, Snapshot
from depthmup.launch.runs.seconds import estimate_seconds


@dataclass(frozen=True, order=True)
class Start:
    """That a process took a run."""

    process: tuple[str, int]  # host and id
    time: float  # seconds since the epoch
    age: float  # of the process then, in seconds
    seconds: float  # that the run then trained; 0 for one that has not ended


def group_starts(starts: Sequence[Start]) -> list[list[Start]]:
    """The starts of one process, in order, by what it trained at once: a run alone ends before the next begins."""
    found: list[list[Start]] = []
    for start in starts:
        before = found[-1][-1] if found else None
        if before and (not before.seconds or start.time - before.time < before.seconds):
            found[-1].append(start)
        else:
            found.append([start])
    return found


def measure_overhead(starts: Sequence[Start]) -> float:
    """Seconds beside training for each run: its process's start, as far as it is this run's, and what passes in the
    process between two runs, in which networks are built, evaluated and written."""
    ages, gaps, followed = 0.0, 0.0, 0
    for _, own in groupby(sorted(starts), key=lambda start: start.process):
        trained = group_starts(list(own))
        ages += trained[0][0].age
        for pack, following in pairwise(trained):
            gaps += max(following[0].time - pack[0].time - sum(start.seconds for start in pack), 0.0)
            followed += len(pack)
    return (ages / len(starts) if starts else 0.0) + (gaps / followed if followed else 0.0)


@dataclass
class Share:
    """Looks at a study again and again. `flops`: of one run of each size; `tasks`: processes of a run; `to_come`: runs,
    of the mean size, that will follow."""

    flops: Mapping[Size, float]
    num_steps: int
    tasks: int = 1
    to_come: int = 0
    ended: dict[str, float] = field(default_factory=dict)  # by run: seconds that it trained
    starts: dict[str, Start] = field(default_factory=dict)

    def look(self, snapshot: Snapshot) -> dict[str, float]:
        """The share of each run's training that is over, by name; what ended is read once."""
        progress = {}
        for found in snapshot.runs:
            name, share = found.run.directory.path.name, 0.0
            if found.state in states.ENDED:
                share = 1.0
                if name not in self.ended:
                    self.ended[name] = (found.run.done() or {}).get("seconds", 0.0) / self.tasks
                    self.note_start(found, self.ended[name])
            elif found.state in states.TRAINS:
                last = found.run.directory.read_last_metrics()
                share = last["step"] / found.run.config.train.num_steps if last else 0.0
                if name not in self.starts:
                    self.note_start(found, 0.0)
            progress[name] = share
        return progress

    def note_start(self, found: RunState, seconds: float) -> None:
        begun = [line for line in read_attempts(found.run.directory) if line["event"] == "started"]
        if begun and "age" in begun[-1]:
            line = begun[-1]
            self.starts[found.run.directory.path.name] = Start(
                (line["host"], line["pid"]), line["time"], line["age"], seconds
            )

    def seconds(self, snapshot: Snapshot) -> dict[Size, float]:
        """Of one run of each size; empty before the first metrics line."""
        known: dict[Size, list[float]] = {}
        for found in snapshot.of("done"):
            known.setdefault(found.run.size, []).append(self.ended[found.run.directory.path.name])
        running = {found.run.directory.path.name: found.run for found in snapshot.of("running")}
        together = Counter(self.starts[name].process for name in running if name in self.starts)
        for name, run in running.items():  # of a size of which none has ended, what its pace says
            last = run.directory.read_last_metrics() if run.size not in known else None
            if last and (rate := last.get("images_per_second")):
                train, start = run.config.train, self.starts.get(name)
                seconds = train.num_steps * train.global_batch_size / rate
                known[run.size] = [seconds / together[start.process] if start else seconds]  # a pack shares them
        return estimate_seconds(self.flops, known, self.num_steps)

    def measure(self, snapshot: Snapshot, since: Mapping[str, float]) -> tuple[float, float]:
        """(the share of the study's seconds that is over, the share that was over where `since` is what `look` found
        then). A run that ended counts as long as it trained, the others as long as their size takes."""
        progress, expected, beside = (
            self.look(snapshot),
            self.seconds(snapshot),
            measure_overhead([*self.starts.values()]),
        )
        if not expected:
            return 0.0, 0.0
        total = self.to_come * (fmean(expected.values()) + beside)
        now = then = 0.0
        for found in snapshot.runs:
            name = found.run.directory.path.name
            cost = self.ended.get(name, expected[found.run.size]) + beside
            total += cost
            now += cost * progress[name]
            then += cost * since.get(name, 0.0)
        return now / total, then / total
