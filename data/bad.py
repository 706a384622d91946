"""Bad samples: how many there may be, and which others take their places."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from depthmup.data.errors import UserError
from depthmup.data.order import EpochOrder
from depthmup.data.reader import BadSample

SHOWN = 20  # pairs of shard and reason in a line of metrics
Place = TypeVar("Place", bound=Hashable)
Sample = TypeVar("Sample")


class BadCount:
    """Counts bad samples by shard and reason, and by epoch: an epoch of `samples` may have `max_bad_fraction` of them,
    and one at least must be good."""

    def __init__(self, max_bad_fraction: float, samples: int) -> None:
        self.allowed, self.max_bad_fraction, self.samples = max_bad_fraction * samples, max_bad_fraction, samples
        self.counts: Counter[tuple[str, str]] = Counter()
        self.by_epoch: Counter[int] = Counter()
        self.missed = 0  # samples that data.backend nvjpeg left to PIL

    def add(self, bad: Iterable[BadSample], epoch: int = 0) -> None:
        for sample in bad:
            self.counts[sample.shard, sample.reason] += 1
            self.by_epoch[epoch] += 1

    def merge_ranks(self, of_all: Iterable["BadCount"]) -> "BadCount":
        """The sum of what all ranks have counted, each its share of the same samples."""
        total = BadCount(self.max_bad_fraction, self.samples)
        for count in of_all:
            total.counts += count.counts
            total.by_epoch += count.by_epoch
            total.missed += count.missed
        return total

    def check(self) -> None:
        """Raises UserError when an epoch had more bad samples than allowed."""
        most = max(self.by_epoch.values(), default=0)
        if most > min(self.allowed, self.samples - 1):
            raise UserError(
                f"{most} of {self.samples} samples are bad, more than data.max_bad_fraction {self.max_bad_fraction} "
                f"allows: {'; '.join(self.lines()[:5])}. 'depthmup inspect' lists them"
            )

    def total(self) -> int:
        return self.counts.total()

    def metrics(self) -> dict[str, int]:
        """For a line of metrics: all, and the most frequent as 'bad_samples/train-000001.tar/empty file'."""
        shown = {f"bad_samples/{shard}/{reason}": n for (shard, reason), n in self.counts.most_common(SHOWN)}
        missed = {"decoded_by_pil": self.missed} if self.missed else {}
        return {"bad_samples": self.total(), **shown, **missed}

    def lines(self) -> list[str]:
        """'train-000001.tar: 2 x empty file', the most frequent first."""
        return [f"{shard}: {count} x {reason}" for (shard, reason), count in self.counts.most_common()]


class StandIns(Generic[Place, Sample]):
    """Reads an epoch's samples. A bad one's place is taken by the next good one of its window, so the order of all
    others stays; in a window of bad ones alone by the first good one of the next (stream, window), in a ring.

    `places` gives the places of a stream's window in the order served, `read` a place's sample or raises BadSample.
    """

    def __init__(
        self,
        order: EpochOrder,
        places: Callable[[int, int], Sequence[Place]],
        read: Callable[[Place], Sample],
        max_bad_fraction: float,
    ) -> None:
        self.order, self.places, self.read, self.max_bad_fraction = order, places, read, max_bad_fraction
        self.bad: dict[Place, BadSample] = {}
        self.beyond: dict[tuple[int, int], Place] = {}  # for each window of bad ones alone

    def try_read(self, place: Place) -> Sample | None:
        """None for a bad one, which is read just once."""
        if place not in self.bad:
            try:
                return self.read(place)
            except BadSample as error:
                self.bad[place] = error.with_traceback(None)  # it would hold the frames' pixels
        return None

    def find_first_good(self, stream: int, window: int, served: int, of_window: Sequence[Place]) -> Sample:
        """The sample number `served` of a window whose places are `of_window`, or who stands in for it.

        Raises UserError when the search has met more bad samples than an epoch may have.
        """
        for number in range(served, served + len(of_window)):
            if (sample := self.try_read(of_window[number % len(of_window)])) is not None:
                return sample
        if (stream, window) not in self.beyond:
            self.beyond[stream, window] = self.find_good_beyond(stream, window)
        return self.read(self.beyond[stream, window])

    def find_good_beyond(self, stream: int, window: int) -> Place:
        windows = self.order.windows_after(stream, window)
        while True:
            count = BadCount(self.max_bad_fraction, self.order.num_steps * self.order.global_batch_size)
            count.add(self.bad.values())
            count.check()
            for place in self.places(*next(windows)):
                if self.try_read(place) is not None:
                    return place
