"""Workers fill batches in memory that they share with the process that trains: none too early, none late, none lost."""

import gc
import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from depthmup.data import workers
from depthmup.data.errors import UserError
from depthmup.data.index import NO_LABEL
from depthmup.data.reader import BadSample
from depthmup.data.workers import Slots, explained_deaths, make_batches

CPU = torch.device("cpu")
SHAPE = (6, 1, 2, 2)  # of a batch


class Numbered:
    """Every row of batch n holds n + 1. The last worker is slow: a batch stands half filled while others go on."""

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        for number in range(30):
            if num_workers > 1 and worker == num_workers - 1:
                time.sleep(0.01)
            images, labels = slots.of(number)
            images[worker::num_workers] = number + 1
            labels[worker::num_workers] = number + 1
            yield (BadSample("a.tar", f"{number}-{worker}", "empty file"),) if number == 7 else ()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_batch_is_whole_and_stays_what_it_is_when_its_slot_is_filled_again(num_workers: int) -> None:
    got = []
    for number, batch in enumerate(make_batches(Numbered(), SHAPE, num_workers, CPU)):
        if number % 4 == 0:
            time.sleep(0.02)  # workers run ahead as far as they may
        got.append(batch)
    assert len(got) == 30
    for number, batch in enumerate(got):
        assert batch.images.shape == SHAPE
        assert batch.images.unique().tolist() == batch.labels.unique().tolist() == [number + 1]
    assert [bad.key for batch in got for bad in batch.bad] == [f"7-{worker}" for worker in range(max(num_workers, 1))]


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        ({"prefetch_factor": 5}, r"data worker \d is asked for batch \d while batch \d is in use"),
        ({"in_order": False}, r"batch \d was handed out, and data worker \d has filled its rows of batch -?\d"),
    ],
)
def test_a_torch_that_asks_its_workers_otherwise_is_refused_and_tears_no_batch(
    otherwise: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that run further ahead than there are slots, or whose parts come in the order in which they are ready."""
    loader = workers.DataLoader
    monkeypatch.setattr(workers, "DataLoader", lambda *args, **options: loader(*args, **{**options, **otherwise}))
    taken = list[list[int]]()

    def take_all() -> None:
        for batch in make_batches(Numbered(), SHAPE, 3, CPU):
            taken.append(batch.labels.unique().tolist())
            time.sleep(0.05)

    with pytest.raises(UserError, match=said) as error:
        take_all()
    assert "set data.num_workers=0" in str(error.value)
    assert taken == [[number + 1] for number in range(len(taken))]  # what was given out is whole
    assert len(taken) < 30


class Sparse:
    """Row r of batch n holds a sample where n + r is even."""

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        for number in range(3):
            images, labels = slots.of(number)
            for row in range(worker, len(images), num_workers):
                images[row] = row
                labels[row] = row if (number + row) % 2 == 0 else NO_LABEL
            yield ()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_without_a_sample_are_left_out(num_workers: int) -> None:
    got = list(make_batches(Sparse(), SHAPE, num_workers, CPU))
    assert [batch.labels.tolist() for batch in got] == [[0, 2, 4], [1, 3, 5], [0, 2, 4]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in got] == [[0, 2, 4], [1, 3, 5], [0, 2, 4]]


class Collecting:
    """Collects garbage; the labels say how much memory the worker has for itself before and after, KiB."""

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        for number in count():
            _, labels = slots.of(number)
            labels[0] = psutil.Process().memory_full_info().uss >> 10
            gc.collect()
            labels[1:] = psutil.Process().memory_full_info().uss >> 10
            yield ()


def test_a_garbage_collection_in_a_worker_copies_nothing_of_what_it_inherited() -> None:
    inherited = [[number] for number in range(500_000)]  # over 40 MB of lists
    [batch] = islice(make_batches(Collecting(), SHAPE, 1, CPU), 1)
    before, after = batch.labels[:2].tolist()
    assert after - before < 8 << 10
    assert len(inherited) == 500_000


def test_nothing_goes_through_dev_shm() -> None:
    """Containers give it 64 MB, and who writes more dies of a bus error."""
    filled = make_batches(Numbered(), (64, 3, 224, 224), 2, CPU)
    next(filled)
    assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()


def test_a_full_dev_shm_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 10))
    with pytest.raises(UserError, match=r"^/dev/shm has 100 KiB free, and 2 data workers need 112: remove .*=0$"):
        next(make_batches(Numbered(), SHAPE, 2, CPU))
    next(make_batches(Numbered(), SHAPE, 1, CPU))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    next(make_batches(Numbered(), SHAPE, 0, CPU))


class Dying:
    """Sends itself a signal at the third batch, as the kernel does where memory is gone."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        for _ in range(2):
            yield ()
        os.kill(os.getpid(), self.number)
        yield ()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            signal.SIGKILL,
            r"killed \(SIGKILL\): .* out of memory: .*launch.memory_gb.*data.num_workers lower",
        ),
        (signal.SIGBUS, r"killed \(SIGBUS\): most likely /dev/shm is full: .*--shm-size.*data.num_workers=0"),
    ],
)
@pytest.mark.parametrize("waiting", [True, False])
def test_why_a_worker_was_killed_and_the_cure_are_said(number: signal.Signals, said: str, waiting: bool) -> None:
    """While the process waits for it or, as torch's handler of SIGCHLD comes at any moment, while it trains."""

    def train() -> None:
        with explained_deaths():
            filled = make_batches(Dying(number), SHAPE, 1, CPU)
            next(filled)
            if not waiting:
                time.sleep(30)
            list(filled)

    with pytest.raises(UserError, match=said):
        train()


def test_other_ends_of_a_worker_keep_their_words() -> None:
    with pytest.raises(RuntimeError, match="DataLoader worker"), explained_deaths():
        list(make_batches(Dying(signal.SIGSEGV), SHAPE, 1, CPU))
