"""minival: of every class its share, the same samples however the shards are cut, and none of them trained on."""

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmup.data.errors import UserError
from depthmup.data.index import Index, Span, load_members
from depthmup.data.loader import TrainingLoader, TrainingStream, iterate_evaluation_batches
from depthmup.data.minival import choose_held_out, hash_names
from depthmup.data.order import EpochOrder, State
from depthmup.data.pack import pack
from depthmup.data.scan import index_shards
from image_sets import config, make_folder, write_tar


def names_of(index: Index, spans: list[Span]) -> list[tuple[str, int]]:
    """Shard-independent name and label of each sample."""
    return [
        (load_members(index.root, span.shard).names[n].decode(), int(load_members(index.root, span.shard).labels[n]))
        for span in spans
        for n in range(span.first, span.first + span.samples)
    ]


def sorted_shards(folder, classes: int, of_each: int, in_shard: int) -> Index:
    """Shards in which the classes follow one another."""
    labels = [label for label in range(classes) for _ in range(of_each)]
    for first in range(0, len(labels), in_shard):
        samples = [
            (f"{first + n:05d}.png", b"image", b"%d" % label)
            for n, label in enumerate(labels[first : first + in_shard])
        ]
        write_tar(folder / f"train-{first // in_shard:04d}.tar", samples)
    return index_shards(str(folder), processes=1)


def test_of_class_sorted_shards_every_class_gives_its_share(tmp_path):
    index = sorted_shards(tmp_path, classes=20, of_each=15, in_shard=50)
    held_out, trained = (names_of(index, index.spans(split, 0.2)) for split in ("minival", "train"))
    assert Counter(label for _, label in held_out) == dict.fromkeys(range(20), 3)
    assert len(held_out) + len(trained) == 300
    assert not set(held_out) & set(trained)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=200),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_each_label_gives_its_share_up_to_one_sample_whatever_the_order_and_the_names(labels, share, seed):
    random = np.random.default_rng(seed)
    labels, hashes = np.array(labels), hash_names(b"%d" % n for n in random.integers(0, 50, len(labels)))
    chosen = choose_held_out(labels, hashes, share)
    assert abs(chosen.sum() - share * len(labels)) <= 0.5 + 1e-9
    for label in np.unique(labels):
        of_label = labels == label
        assert abs(chosen[of_label].sum() - share * of_label.sum()) < 1 + 1e-9


def test_the_choice_depends_neither_on_the_order_nor_on_the_sizes_of_shards(tmp_path):
    source = str(make_folder(tmp_path / "images", 120, classes=4))
    chosen = []
    for name, options in (("a", {}), ("b", {"shard_samples": 7}), ("c", {"seed": 5, "shard_samples": 50})):
        index, _ = pack(source, tmp_path / name, **options)
        chosen.append(set(names_of(index, index.spans("minival", 0.1))))
        assert len(chosen[-1]) == 12
    assert chosen[0] == chosen[1] == chosen[2]
    assert chosen[0] < set(names_of(index, index.spans("minival", 0.3)))


def test_names_that_every_shard_uses_again_are_not_held_out_together():
    """As where each shard counts its samples from 0: else all samples of the lowest hashes' names would be taken."""
    names = hash_names(b"%d.jpg" % number for _ in range(50) for number in range(20))
    chosen = choose_held_out(np.zeros(1000, np.int64), names, 0.1).reshape(50, 20)
    assert chosen.sum() == 100
    assert chosen.sum(axis=0).max() < 20  # of 50 samples with one name
    assert chosen.sum(axis=1).max() < 10


def test_a_share_that_holds_out_no_sample_is_refused(tmp_path):
    index, _ = pack(str(make_folder(tmp_path / "images", 12)), tmp_path / "shards")
    for share in (0, 0.01):
        with pytest.raises(UserError, match=rf"'minival' of \S+ is empty \(data.minival is {share}\)"):
            index.spans("minival", share)


def test_an_epoch_permutes_whole_shards_though_held_out_samples_cut_them_into_spans(tmp_path):
    index, _ = pack(str(make_folder(tmp_path / "images", 200)), tmp_path / "shards", shard_samples=20)
    order = EpochOrder(index.spans("train", 0.2), seed=0, epoch=0, num_streams=2, global_batch_size=4, window=8)
    shards = [span.shard.name for span in order.spans]
    changes = sum(a != b for a, b in pairwise(shards))
    assert (changes, len(set(shards))) == (9, 10)
    assert shards != sorted(shards)


def test_training_never_serves_a_held_out_sample(tmp_path):
    index, _ = pack(str(make_folder(tmp_path / "images", 90)), tmp_path / "shards", shard_samples=20)
    for in_memory in (False, True):
        settings = config(index, minival=0.3, num_streams=3, window=4, in_memory=in_memory, augment="none")
        batches = TrainingLoader(TrainingStream(settings, index, State(0), 9, 8, 3))
        pixels = [image.numpy().tobytes() for batch in islice(batches, 7) for image in batch.images]
        assert len(set(pixels)) == len(pixels) == 63
        held_out = [
            i.numpy().tobytes()
            for b in iterate_evaluation_batches(settings, index, "minival", 9, 8, 3)
            for i in b.images
        ]
        assert len(held_out) == 27
        assert not set(pixels) & set(held_out)
