"""Single samples out of tar shards, by the byte offsets of the index."""

import re
import tarfile
from dataclasses import dataclass

from depthmup.data import storage
from depthmup.data.index import NO_LABEL, TAR_BLOCK, Index, Span


class BadSample(Exception):
    """A sample that cannot be used. `shard` and `key` name it; `reason` is the same for all of its kind."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all three, so that it can be sent from a worker process
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample: its key, the image file's bytes and the class label."""

    shard: str
    key: str
    image: bytes
    label: int


def replace_non_ascii(name: str) -> str:
    """`name` with ? for all other characters, as the header after a pax record (which has the name) may hold it."""
    return re.sub(r"[^\x00-\x7f]", "?", name)


def read_sample(index: Index, span: Span, number: int) -> RawSample:
    """Sample `number` of `span`. Raises BadSample, and UserError when the shard cannot be read at all."""
    shard, members = span.shard, index.members(span.shard)
    row = span.first + number
    offset, size, label = int(members.offsets[row]), int(members.sizes[row]), int(members.labels[row])
    name = members.names[row].decode("utf-8", "backslashreplace")
    content = storage.read_range(index.location(shard), shard.sha256, shard.size, offset - TAR_BLOCK, size + TAR_BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(content[:TAR_BLOCK], "utf-8", "surrogateescape")
        indexed = replace_non_ascii(members.names[row].decode("utf-8", "surrogateescape"))
        named = indexed.startswith(
            replace_non_ascii(header.name).rstrip("?")
        )  # a long name is cut, maybe inside a character
        agrees = named and header.size == size and len(content) == size + TAR_BLOCK
    except tarfile.HeaderError:
        agrees = False
    reason = None
    if not agrees:
        reason = "the index disagrees with the shard"
    elif size == 0:
        reason = "empty file"
    elif label == NO_LABEL:
        reason = "no whole number in a member .cls"
    elif label >= len(index.classes):
        reason = f"label {label}, but there are {len(index.classes)} classes"
    if reason:
        raise BadSample(shard.name, name, reason)
    return RawSample(shard.name, name, content[TAR_BLOCK:], label)


def prefetch(index: Index, span: Span) -> None:
    """Has the span read ahead as a whole, before its samples are read in another order. Waits for nothing."""
    members = index.members(span.shard)
    first, last = span.first, span.first + span.samples - 1
    start, stop = int(members.offsets[first]), int(members.offsets[last] + members.sizes[last])
    storage.prefetch(index.location(span.shard), span.shard.sha256, span.shard.size, start, stop - start)
