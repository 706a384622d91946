"""data.in_memory gives the batches of the streamed data, bit for bit, and decodes once in a process."""

from itertools import islice

import pytest
import torch

from depthmup.data import memory
from depthmup.data.errors import UserError
from depthmup.data.loader import TrainingLoader, TrainingStream, iterate_evaluation_batches
from depthmup.data.order import State
from image_sets import config, make_shards


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_training_batches_equal_the_streamed_ones_over_epochs_ranks_and_a_resume(tmp_path, augment):
    index = make_shards(tmp_path, samples=90, size=(10, 12))
    settings = {"num_streams": 4, "window": 5, "minival": 0.1, "augment": augment}

    def batches(in_memory, state, rank):
        loader = TrainingLoader(
            TrainingStream(config(index, in_memory=in_memory, **settings), index, state, 8, 8, 3, rank, 2)
        )
        return [(batch, loader.state) for batch in islice(loader, 25)]  # 10 steps an epoch

    for rank in range(2):
        for state in (State(seed=1), State(seed=1, epoch=1, position=24)):
            for (streamed, at), (kept, kept_at) in zip(
                batches(False, state, rank), batches(True, state, rank), strict=True
            ):
                assert same(streamed, kept)
                assert at == kept_at


@pytest.mark.parametrize("size", [(8, 8), None])
def test_evaluation_batches_equal_the_streamed_ones(tmp_path, size):
    index = make_shards(tmp_path, samples=50, size=size)
    for rank in range(3):
        streamed, kept = (
            list(
                iterate_evaluation_batches(
                    config(index, minival=0.5, in_memory=in_memory), index, "minival", 4, 8, 3, rank=rank, world_size=3
                )
            )
            for in_memory in (False, True)
        )
        assert len(streamed) == len(kept)
        assert all(same(a, b) for a, b in zip(streamed, kept, strict=True))


def test_a_process_decodes_a_data_set_once_and_again_when_its_shards_change(tmp_path, monkeypatch):
    index = make_shards(tmp_path, samples=20)
    decoded = []
    original = memory.decode_sample
    monkeypatch.setattr(memory, "decode_sample", lambda *a: decoded.append(a) or original(*a))

    def first_batch(index):
        stream = TrainingStream(config(index, in_memory=True, num_streams=2, minival=0), index, State(0), 4, 8, 3)
        return next(iter(TrainingLoader(stream)))

    first_batch(index)
    first_batch(index)
    assert len(decoded) == 20
    first_batch(make_shards(tmp_path / "other", samples=20, classes=2))
    assert len(decoded) == 40


def test_resized_crops_of_images_of_different_sizes_are_refused_in_memory(tmp_path):
    index = make_shards(tmp_path, samples=20, size=None)
    settings = config(index, in_memory=True, num_streams=2, augment="resized_crop_flip")
    with pytest.raises(UserError, match="one size"):
        next(iter(TrainingLoader(TrainingStream(settings, index, State(0), 4, 8, 3))))
