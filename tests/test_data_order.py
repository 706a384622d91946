"""The order of samples: exact, elastic, resumable; and what is read follows it."""

from dataclasses import FrozenInstanceError, replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import depthmup.data.index
from depthmup.data.errors import UserError
from depthmup.data.index import Index, Shard, Span
from depthmup.data.keys import seed_for
from depthmup.data.loader import TrainingLoader, TrainingStream, iterate_evaluation_batches, share_spans
from depthmup.data.order import EpochOrder, State, list_rows, list_streams
from image_sets import config, make_shards


@st.composite
def planned_epochs(draw):
    """An order over random shard sizes, and a divisor of its number of streams."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    num_streams = draw(st.sampled_from([1, 2, 4, 12, 64]))
    per_stream = draw(st.integers(1, max(1, min(4, sum(sizes) // num_streams))))
    spans = [Span(Shard(f"{number}.tar", size, 0, ""), 0, size) for number, size in enumerate(sizes)]
    if sum(sizes) < num_streams * per_stream:
        spans.append(Span(Shard("last.tar", 300, 0, ""), 0, 300))
    return EpochOrder(
        spans,
        seed=draw(st.integers(0, 9)),
        epoch=draw(st.integers(0, 9)),
        num_streams=num_streams,
        global_batch_size=num_streams * per_stream,
        window=draw(st.integers(1, 20)),
    ), num_streams


def served(order, stream):
    """The stream's samples in the order served, as (shard, number)."""
    samples = []
    for window in range(order.num_windows):
        spans = order.contiguous(stream, *order.window_bounds(window))
        read = [(span.shard.name, span.first + number) for span in spans for number in range(span.samples)]
        samples += [read[place] for place in order.permutation(stream, window)]
    return samples


def test_training_begins_at_the_first_sample_of_epoch_0_and_a_state_is_a_value_that_nobody_changes():
    assert State(7) == State(seed=7, epoch=0, position=0)
    with pytest.raises(FrozenInstanceError):
        State(7).position = 1


@given(planned_epochs())
@settings(max_examples=150, deadline=None)
def test_an_epoch_serves_every_sample_at_most_once_and_leaves_out_less_than_a_batch(planned):
    order, num_streams = planned
    samples = [sample for stream in range(num_streams) for sample in served(order, stream)]
    assert len(set(samples)) == len(samples) == order.num_steps * order.global_batch_size
    assert order.total - len(samples) < order.global_batch_size


@given(planned_epochs(), st.sampled_from([1, 2, 3, 4, 6, 12, 64]))
@settings(max_examples=150, deadline=None)
def test_processes_share_all_streams_or_are_refused_when_they_do_not_divide(planned, world_size):
    _, num_streams = planned
    if num_streams % world_size:
        with pytest.raises(UserError, match=r"data\.num_streams"):
            list_streams(0, world_size, num_streams)
        return
    parts = [list_streams(rank, world_size, num_streams) for rank in range(world_size)]
    assert sorted(stream for part in parts for stream in part) == list(range(num_streams))
    assert len({len(part) for part in parts}) == 1


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_any_number_of_workers_fills_each_row_once_and_all_do_the_same(num_workers, num_rows, first):
    filled = [0] * num_workers
    for number in range(first, first + num_workers):
        parts = [list_rows(worker, num_workers, num_rows, number) for worker in range(num_workers)]
        assert [row for part in parts for row in part] == list(range(num_rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        filled = [before + len(part) for before, part in zip(filled, parts, strict=True)]
    assert set(filled) == {num_rows}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_evaluation_gives_each_sample_to_exactly_one_rank(sizes, world_size):
    spans = [Span(Shard(f"{number}.tar", size, 0, ""), 3, size) for number, size in enumerate(sizes)]
    parts = [share_spans(spans, rank, world_size) for rank in range(world_size)]
    read = [(s.shard.name, s.first + n) for part in parts for s in part for n in range(s.samples)]
    assert read == [(s.shard.name, s.first + n) for s in spans for n in range(s.samples)]


def test_what_an_epoch_leaves_out_changes_from_epoch_to_epoch():
    spans = [Span(Shard(f"{number}.tar", 10, 0, ""), 0, 10) for number in range(3)]
    left_out = []
    for epoch in range(20):
        order = EpochOrder(spans, seed=0, epoch=epoch, num_streams=4, global_batch_size=8, window=5)
        taken = {sample for stream in range(4) for sample in served(order, stream)}
        left_out.append({(span.shard.name, n) for span in spans for n in range(10)} - taken)
    assert all(len(rest) == 6 for rest in left_out)
    assert len(set().union(*left_out)) == 30


def test_the_order_is_the_same_in_all_versions():
    """A change of the order would silently spoil the resume of runs that are under way."""
    spans = [Span(Shard(f"{number}.tar", 5, 0, ""), 0, 5) for number in range(3)]
    order = EpochOrder(spans, seed=1, epoch=2, num_streams=2, global_batch_size=4, window=3)
    found = " ".join(f"{shard[0]}{number}" for stream in range(2) for shard, number in served(order, stream))
    assert found == "24 23 10 11 13 12 00 14 01 03 02 04"


@given(st.lists(st.integers(0, 2**70), max_size=5), st.lists(st.integers(0, 2**70), max_size=5))
@settings(max_examples=200, deadline=None)
def test_two_keys_of_random_numbers_never_give_the_same_seed(key, other):
    assert (seed_for("a", *key) == seed_for("a", *other)) == (key == other)
    assert seed_for("a", *key) != seed_for("b", *key)
    assert seed_for("a", *key) != seed_for("a", *key, 0)
    assert seed_for("a", 2**32 + 7, *key) != seed_for("a", 7, 1, *key)


def test_seeds_that_differ_above_32_bits_give_other_orders():
    spans = [Span(Shard(f"{number}.tar", 50, 0, ""), 0, 50) for number in range(5)]
    options = {"epoch": 0, "num_streams": 2, "global_batch_size": 4, "window": 50}
    orders = [EpochOrder(spans, seed=seed, **options) for seed in (7, 7 + 2**32, 7 + 2**64)]
    assert len({tuple(served(order, 1)) for order in orders}) == 3
    assert len({tuple(order.draws(stream, 0, 1).ravel()) for order in orders for stream in (0, 1)}) == 6


def test_each_seed_epoch_stream_and_window_draws_numbers_of_its_own_for_augmentation():
    def draws(seed=0, epoch=0, stream=0, window=0):
        spans = [Span(Shard("0.tar", 96, 0, ""), 0, 96)]
        order = EpochOrder(spans, seed=seed, epoch=epoch, num_streams=2, global_batch_size=4, window=8)
        return order.draws(stream, window, 3)

    first = draws()
    assert first.shape == (8, 3)
    assert (first == draws()).all()
    for other in ({"seed": 1}, {"epoch": 1}, {"stream": 1}, {"window": 1}):
        assert (first != draws(**other)).all(), other


def test_planning_reads_only_what_one_reader_needs():
    """4,096 processes over 10,000 shards: one reader plans its first window from the index alone."""
    spans = [Span(Shard(f"{number}.tar", 1281, 0, ""), 0, 1281) for number in range(10_000)]
    order = EpochOrder(spans, seed=0, epoch=0, num_streams=32768, global_batch_size=32768, window=64)
    stream = list_streams(4095, 4096, 32768)[7]
    assert sum(span.samples for span in order.contiguous(stream, 0, 64)) == 64


def global_batches(index, settings, state, steps, world_size=1):
    """The batches of all ranks, put together stream by stream: (images, labels) of each step."""
    loaders = [
        TrainingLoader(TrainingStream(settings, index, state, 16, 8, 3, rank, world_size)) for rank in range(world_size)
    ]
    collected = []
    for parts in islice(zip(*loaders, strict=True), steps):
        per_stream = 16 // settings.num_streams

        def together(tensors, per_stream=per_stream):
            return torch.stack([t.unflatten(0, (-1, per_stream)) for t in tensors], dim=1).flatten(0, 2)

        images, labels = together([p.images for p in parts]), together([p.labels for p in parts])
        collected.append((images, labels, loaders[0].state))
    return collected


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("photos"), samples=150, size=None, shard_samples=61)


@pytest.mark.parametrize("augment", [pytest.param("crop_flip", marks=pytest.mark.long), "resized_crop_flip"])
def test_global_batches_are_bit_identical_for_worlds_and_workers_and_after_a_resume(photos, augment):
    settings = config(photos, num_streams=8, window=6, augment=augment, minival=0)
    steps = 12  # 9 in the first epoch
    expected = global_batches(photos, settings, State(seed=3), steps)
    for world_size, num_workers in [(1, 3), (2, 2), (4, 0), (8, 3)]:
        got = global_batches(photos, replace(settings, num_workers=num_workers), State(seed=3), steps, world_size)
        for (images, labels, at), (other_images, other_labels, other_at) in zip(expected, got, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)
            assert at == other_at
    for done in (1, 5, 8, 9, 10):
        resumed = global_batches(photos, settings, expected[done - 1][2], steps - done, world_size=2)
        for (images, labels, _), (other_images, other_labels, _) in zip(expected[done:], resumed, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)


def test_a_resume_reads_no_more_than_one_window_a_stream_again(photos, monkeypatch):
    from depthmup.data import batch

    read = []
    original = batch.read_sample
    monkeypatch.setattr(batch, "read_sample", lambda *arguments: read.append(arguments) or original(*arguments))
    settings = config(photos, num_streams=8, window=6, minival=0)
    global_batches(photos, settings, State(seed=3, position=7 * 16), 1)
    assert len(read) == 16  # by offset: not even the window


def test_evaluation_counts_every_image_once_on_any_world_size(photos):
    settings = config(photos, minival=0.3)
    one = torch.cat([b.images for b in iterate_evaluation_batches(settings, photos, "minival", 7, 8, 3)])
    assert len(one) == 45
    for world_size in (2, 7, 64):
        parts = [
            b.images
            for rank in range(world_size)
            for b in iterate_evaluation_batches(settings, photos, "minival", 7, 8, 3, rank, world_size)
        ]
        assert torch.equal(torch.cat(parts), one)
    random_numbers = torch.get_rng_state()
    with_workers = iterate_evaluation_batches(replace(settings, num_workers=2), photos, "minival", 7, 8, 3, 1, 2)
    assert torch.equal(torch.cat([b.images for b in with_workers]), one[22:])
    assert torch.equal(torch.get_rng_state(), random_numbers)  # the training that goes on draws what it would have


# ---------------------------------------------------------------- data.window: epoch


def all_served(order):
    """Each stream's (shard, number) in the order served, as the loader reads them."""
    return [
        [(span.shard.name, span.first + n) for w in range(order.num_windows) for span, n in order.samples(stream, w)]
        for stream in range(order.num_streams)
    ]


@given(planned_epochs())
@settings(max_examples=100, deadline=None)
def test_the_samples_of_a_window_are_those_of_its_spans_in_the_order_of_its_permutation(planned):
    order, num_streams = planned
    assert all_served(order) == [served(order, stream) for stream in range(num_streams)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_a_shuffled_epoch_serves_every_sample_at_most_once_and_leaves_out_less_than_a_batch(sizes, seed):
    spans = [Span(Shard(f"{number}.tar", size + 5, 0, ""), 3, size) for number, size in enumerate([*sizes, 8])]
    order = EpochOrder(spans, seed=seed, epoch=1, num_streams=4, global_batch_size=8, window="epoch")
    samples = [sample for stream in all_served(order) for sample in stream]
    assert len(set(samples)) == len(samples) == order.num_steps * 8
    assert order.total - len(samples) < 8
    assert set(samples) <= {(span.shard.name, span.first + n) for span in spans for n in range(span.samples)}


def test_a_shuffled_epoch_makes_batches_of_all_classes_from_sorted_shards():
    """1,000 classes, sorted: a window of 64 holds a class or two, a permutation as many as chance does."""
    spans = [Span(Shard(f"{number}.tar", 1000, 0, ""), 0, 1000) for number in range(20)]  # 50 classes a shard

    def classes_in_a_batch(window):
        order = EpochOrder(spans, seed=0, epoch=0, num_streams=64, global_batch_size=1024, window=window)
        first = [sample for stream in all_served(order) for sample in stream[:16]]
        return len({int(shard.removesuffix(".tar")) * 50 + number // 20 for shard, number in first})

    assert classes_in_a_batch(64) < 320
    assert 600 < classes_in_a_batch("epoch") < 690  # 641 are expected of 1,024 draws from 1,000 classes


def test_a_shuffled_epoch_is_another_permutation_for_each_seed_and_epoch_and_the_same_in_all_versions():
    spans = [Span(Shard(f"{number}.tar", 5, 0, ""), 0, 5) for number in range(3)]
    options = {"num_streams": 2, "global_batch_size": 4, "window": "epoch"}
    orders = [
        all_served(EpochOrder(spans, seed=seed, epoch=epoch, **options)) for seed in (1, 2) for epoch in (0, 1, 2)
    ]
    assert len({str(order) for order in orders}) == 6
    found = " ".join(f"{shard[0]}{number}" for stream in orders[2] for shard, number in stream)
    assert found == "14 22 12 02 03 00 21 23 11 10 04 01"


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_shuffled_epoch_gives_the_same_batches_for_worlds_and_workers_and_after_a_resume(photos, in_memory):
    index = Index.load(photos.root)
    settings = config(index, num_streams=8, window="epoch", augment="crop_flip", minival=0.1)
    expected = global_batches(index, settings, State(seed=3), 10)
    chosen = replace(settings, num_workers=3, in_memory=in_memory)
    for world_size, first in ((2, 0), (1, 5), (1, 8)):
        state = expected[first - 1][2] if first else State(seed=3)
        got = global_batches(index, chosen, state, 10 - first, world_size)
        for (images, labels, _), (other_images, other_labels, _) in zip(expected[first:], got, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)


def test_a_shuffled_epoch_reads_each_sidecar_once_however_many_shards_there_are(photos, monkeypatch):
    index = Index.load(photos.root)
    read = []
    original = depthmup.data.index.load_members
    monkeypatch.setattr(
        depthmup.data.index, "load_members", lambda root, shard: read.append(shard.name) or original(root, shard)
    )
    settings = config(index, num_streams=8, window="epoch", minival=0)
    global_batches(index, settings, State(seed=3), 9)
    assert sorted(read) == sorted(shard.name for shard in index.splits["train"])


def test_a_shuffled_epoch_of_remote_shards_is_refused_with_what_to_do(photos):
    index = Index("https://example.org/shards", photos.classes, photos.splits)
    stream = TrainingStream(config(index, num_streams=8, window="epoch", minival=0), index, State(0), 16, 8, 3)
    with pytest.raises(UserError, match=r"^https://.*\.tar: data\.window=epoch reads .*copy the shards .* a number$"):
        TrainingLoader(stream)
