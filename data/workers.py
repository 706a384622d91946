"""Worker processes that write batches straight into memory which they share with the process that trains."""

import ctypes
import gc
import mmap
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from depthmup.data.batch import Batch
from depthmup.data.errors import UserError
from depthmup.data.index import NO_LABEL
from depthmup.data.reader import BadSample

warnings.filterwarnings("ignore", "This DataLoader will create")  # describe_too_few_cpus says it once, and what to do

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches that workers make ready ahead
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# Sent to all processes of a job, they are for the one that trains: a worker that died of them would end the run.
JOB_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP}

OTHER_TORCH = (
    f"torch {torch.__version__} asks its workers in an order that is not known here: use another version of torch, or "
    "set data.num_workers=0"
)

KILLED_BY = re.compile(r"is killed by signal: ([^.]+)\.")
CURES = {
    signal.SIGKILL: "most likely the job or the machine ran out of memory: ask for more (launch.memory_gb; "
    "sbatch --mem; docker --memory), or set data.num_workers lower",
    signal.SIGBUS: f"most likely {SHARED_MEMORY} is full: remove what was left there (ls -l {SHARED_MEMORY}), "
    "enlarge it (docker: --shm-size=1g), or set data.num_workers=0",
}


def share_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that this process and those forked from it share. Not in /dev/shm, which containers keep small."""
    count = int(np.prod(shape))
    return torch.frombuffer(mmap.mmap(-1, max(count * dtype.itemsize, 1)), dtype=dtype, count=count).view(shape)


def describe_too_few_cpus(num_workers: int) -> str | None:
    """What to do where the workers have fewer CPUs than they are, and so are slow for no reason that anyone sees; None
    where they have enough."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpus >= num_workers:
        return None
    return (
        f"{num_workers} data workers share {cpus} CPU(s): ask for more a task (launch.cpus_per_task; "
        f"srun --cpus-per-task, which sbatch's own does not set), or set data.num_workers={cpus}"
    )


def check_shared_memory(num_workers: int) -> None:
    """The queues to the workers have their semaphores in /dev/shm: 32 KiB, and 12 for each (torch 2.13), and as much
    again for those of an evaluation. Raises UserError where there is less."""
    needed = 2 * (32 + 12 * num_workers) if num_workers and SHARED_MEMORY.exists() else 0  # KiB; Linux alone has it
    if needed and (free := shutil.disk_usage(SHARED_MEMORY).free >> 10) < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free} KiB free, and {num_workers} data workers need {needed}: remove what was left "
            f"there (ls -l {SHARED_MEMORY}), enlarge it (docker: --shm-size=1g), or set data.num_workers=0"
        )


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Raises UserError with the likely reason and the cure where a data worker was killed while the block runs.

    torch says no more than that it was, and from its handler of SIGCHLD: wherever the main thread is at that moment.
    """
    try:
        yield
    except RuntimeError as error:
        chain = f"{error} {error.__cause__} {error.__context__}"
        if "DataLoader worker" not in chain:
            raise
        signalled = KILLED_BY.search(chain)
        number = map_signal_words().get(signalled[1]) if signalled else signal.SIGKILL
        if number not in CURES:
            raise
        how = f"was killed ({number.name})" if signalled else "ended without a word"
        raise UserError(f"a data worker {how}: {CURES[number]}") from error


def map_signal_words() -> dict[str | None, signal.Signals]:
    """Signals by the words that the C library has for them."""
    return {signal.strsignal(number): number for number in signal.Signals}


class Slots:
    """Memory for a few batches, filled in turns: batch number n of a run of batches lies in slot n % `count`.

    What the workers inherit and use again and again is mapped, touched and pinned once, not for each batch. `shape`:
    (batch, channels, size, size) of the images, which lie channels last, as they are decoded.

    That no worker writes into a batch that is in use, and that a batch is whole when it is read, follows from the order
    in which torch's DataLoader asks its workers, which torch does not promise. So both are looked at, by numbers.
    """

    def __init__(self, count: int, shape: tuple[int, int, int, int], num_workers: int) -> None:
        batch_size, channels, height, width = shape
        pixels = share_zeros((count, batch_size, height, width, channels), torch.uint8)
        # One channel is first and last; convolutions then go by the strides, and shall see the usual ones.
        self.images = pixels.view(count, *shape) if channels == 1 else pixels.permute(0, 1, 4, 2, 3)
        self.labels = share_zeros((count, batch_size), torch.int64)
        self.done = share_zeros((count, num_workers), torch.int64).fill_(
            -1
        )  # which batch's part a worker has filled last
        self.in_use = share_zeros((1,), torch.int64)  # the first batch that its reader has not gone on from

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Images and labels of batch `number`, to be filled or read."""
        slot = number % len(self.images)
        return self.images[slot], self.labels[slot]

    def begin(self, number: int, worker: int) -> None:
        """Before a worker fills its rows of batch `number`. Raises UserError where that slot is in use."""
        if number - len(self.images) >= int(self.in_use):
            raise UserError(
                f"data worker {worker} is asked for batch {number} while batch {number - len(self.images)} is in use: "
                f"{OTHER_TORCH}"
            )

    def end(self, number: int, worker: int) -> None:
        self.done[number % len(self.images), worker] = number

    def put(self, number: int, row: int, image: Any, draws: np.ndarray) -> None:
        """Fills a row with `image`. `draws`: the random numbers that its sample has taken."""
        self.images[number % len(self.images), row] = image

    def release(self, number: int) -> None:
        """Once all that was read of batch `number` is elsewhere."""
        self.in_use.fill_(number + 1)

    def check_filled(self, number: int) -> None:
        """Raises UserError where a worker has not filled its rows of batch `number`."""
        done = self.done[number % len(self.images)].tolist()
        if wrong := [worker for worker, of_worker in enumerate(done) if of_worker != number]:
            raise UserError(
                f"batch {number} was handed out, and data worker {wrong[0]} has filled its rows of batch "
                f"{done[wrong[0]]}: {OTHER_TORCH}"
            )

    def filled(self, number: int, bad: tuple[BadSample, ...]) -> Batch:
        """The rows of batch `number` that hold a sample; good until it is released. Raises UserError where a worker has
        not filled its rows."""
        self.check_filled(number)
        images, labels = self.of(number)
        good = labels != NO_LABEL
        return Batch(images, labels, bad) if good.all() else Batch(images[good], labels[good], bad)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Page-locked, so that a GPU copies from them while the host goes on. Raises torch.cuda.CudaError."""
        runtime, tensors = torch.cuda.cudart(), (self.images, self.labels)
        for tensor in tensors:
            torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        try:
            yield
        finally:
            for tensor in tensors:
                torch.cuda.check_error(runtime.cudaHostUnregister(tensor.data_ptr()))


class Work(Protocol):
    """What workers do together: each fills some rows of every batch."""

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        """Writes its rows of batch 0, 1, ... to `slots`, only when asked for the next, and gives the bad samples among
        them. A row without a sample gets NO_LABEL; all workers fill the same number of batches."""
        ...


@dataclass
class Parts(IterableDataset):
    """A worker's side: torch's DataLoader asks for one part of a batch after the other, and carries what was bad."""

    work: Work
    slots: Slots

    def __iter__(self) -> Iterator[tuple[BadSample, ...]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        parts = self.work.fill(self.slots, worker, num_workers)
        for number in count():
            self.slots.begin(number, worker)
            try:
                part = next(parts)
            except StopIteration:
                return
            self.slots.end(number, worker)
            yield part


def start_worker(worker: int) -> None:
    """In a new worker: it ends when the process that trains says so or is gone, and sleeps through JOB_SIGNALS.

    Has glibc give freed pictures back at once: its heap of buffers of all sizes grew from 80 to 280 MB a worker. And
    keeps the garbage collector off what it inherited: to look at an object is to get an own copy of its memory, 43 MB.
    """
    gc.freeze()
    threading.Thread(target=end_with_parent, daemon=True).start()
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none, and no need of it
        mallopt(M_MMAP_THRESHOLD, 256 * 1024)


def end_with_parent() -> None:
    """Ends this worker at a SIGTERM of its parent, which is how Python stops workers that are left at its exit."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def start(work: Work, slots: Slots, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
    """Starts the workers. Each turn of what is returned has filled a worker's rows, those of worker 0 first.

    Raises UserError where /dev/shm is full.
    """
    check_shared_memory(num_workers)
    loader = DataLoader(
        Parts(work, slots),
        batch_size=None,
        collate_fn=tuple,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED if num_workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own, so that no number is taken from the training's
        # Python's default until 3.14. There a server starts them, and they would not end with this process.
        multiprocessing_context="fork" if num_workers else None,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # workers are born with it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def yield_in_order(parts: Iterator[tuple[BadSample, ...]], num_parts: int) -> Iterator[tuple[BadSample, ...]]:
    """The bad samples of one batch after the other, each of `num_parts` parts. Raises a worker's UserError with its own
    words, which torch buries in a traceback."""
    try:
        while True:
            with explained_deaths():
                of_batch = tuple(islice(parts, num_parts))
            if len(of_batch) < num_parts:
                return
            yield tuple(bad for part in of_batch for bad in part)
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def make_batches(
    work: Work, shape: tuple[int, int, int, int], num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches that `num_workers` processes (0: this one) fill, on `device`. `shape`: of a batch's images.

    A worker is asked for its part of batch n + PREFETCHED when that of batch n is taken. With one slot more than that,
    batch n is written over only after this generator has gone on from it.
    """
    slots = Slots(PREFETCHED + 1 if num_workers else 1, shape, max(num_workers, 1))
    parts = start(work, slots, num_workers)  # before they are pinned: what CUDA has registered need not survive a fork
    if device.type != "cuda":
        for number, bad in enumerate(yield_in_order(parts, max(num_workers, 1))):
            batch = slots.filled(number, bad).copy()
            slots.release(number)
            yield batch
        return
    copies = torch.cuda.Stream(device)
    with slots.pinned():
        for number, bad in enumerate(yield_in_order(parts, max(num_workers, 1))):
            batch = slots.filled(number, bad).to(device, copies)
            copied = copies.record_event()
            try:
                yield batch
            finally:
                copied.synchronize()
                slots.release(number)
