"""What wandb keeps on the disk of a run that is offline."""

import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

WAIT = 60  # seconds for wandb's own process, which writes the last records a little after the run has finished


def read_records(file: Path) -> Iterator[Record]:
    """The records in LevelDB's log format, after 7 bytes of wandb's own."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little of a block for a header is left empty
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def records_of(file: Path) -> list[Record]:
    """All records of a run that has finished."""
    until = time.monotonic() + WAIT
    while not (records := list(read_records(file))) or not records[-1].HasField("exit"):
        assert time.monotonic() < until, f"wandb never ended {file}"
        time.sleep(0.05)
    return records
