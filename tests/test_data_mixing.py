"""RandAugment, colour jitter, mixup and CutMix: the libraries' results, drawn from the position alone."""

import hashlib
import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from image_sets import config, make_shards
from train_configs import pack_digits, run_config

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from torchvision.transforms import functional

from depthmup.data.augment import crop_flip
from depthmup.data.config import DataConfig
from depthmup.data.decode import to_pil
from depthmup.data.distort import color_jitter, distort, prepare_training_image, seeded
from depthmup.data.errors import UserError
from depthmup.data.keys import seed_for
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.mixing import mix
from depthmup.data.order import State
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import run

DISTORTED = {"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}
STREAMS = {"num_streams": 4, "window": 5, "minival": 0.1}


def batches(index, settings: DataConfig, count: int, state=State(seed=1), rank=0, world_size=1):  # noqa: B008  (frozen)
    stream = TrainingStream(settings, index, state, 8, 8, 3, rank, world_size)
    return [batch.images for batch in islice(TrainingLoader(stream), count)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batches_without_distortions_are_those_of_before_they_existed(tmp_path):
    index, digest = make_shards(tmp_path, samples=90), hashlib.sha256()
    stream = TrainingStream(config(index, augment="crop_flip", **STREAMS), index, State(seed=1), 8, 8, 3)
    for batch in islice(TrainingLoader(stream), 25):
        digest.update(batch.images.numpy().tobytes())
        digest.update(batch.labels.numpy().tobytes())
    assert digest.hexdigest() == "9e814bbf57006a7857cfa69b4b83b278057f5541874e09b81e44199f9235830a"


def test_a_draw_below_one_half_mirrors_left_and_right():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    draws = np.full((2, 41), 0.45)  # the middle of the possible shifts, and of the possible crops
    draws[1, 0] = 0.55
    mirrored, kept = crop_flip(images[:1].expand(2, -1, -1, -1), torch.from_numpy(draws))
    assert torch.equal(mirrored, kept.flip(2))
    settings = DataConfig(name="x", root="x", augment="resized_crop_flip")
    mirrored, kept = (prepare_training_image(images[0], settings, 8, drawn) for drawn in draws)
    assert torch.equal(mirrored, kept.flip(2))


@pytest.mark.parametrize(
    "augment", ["resized_crop_flip", *(pytest.param(name, marks=pytest.mark.long) for name in ("none", "crop_flip"))]
)
def test_distorted_batches_are_the_same_for_any_workers_ranks_resume_and_in_memory(tmp_path, augment):
    index = make_shards(tmp_path, samples=90, size=(10, 12))
    settings = config(index, augment=augment, **STREAMS, **DISTORTED)
    whole = batches(index, settings, 15)  # 10 steps an epoch
    assert not any(
        torch.equal(a, b)
        for a, b in zip(whole, batches(index, config(index, augment=augment, **STREAMS), 15), strict=True)
    )
    assert_equal(batches(index, replace(settings, num_workers=1), 15), whole)
    assert_equal(batches(index, replace(settings, num_workers=2), 15), whole)
    assert_equal(batches(index, replace(settings, in_memory=True), 15), whole)
    assert_equal(batches(index, settings, 8, State(seed=1, position=7 * 8)), whole[7:])
    per_rank = [batches(index, settings, 15, rank=rank, world_size=2) for rank in range(2)]
    parts = [
        torch.stack([a.unflatten(0, (2, 2)), b.unflatten(0, (2, 2))], dim=1) for a, b in zip(*per_rank, strict=True)
    ]
    assert_equal([part.flatten(0, 2) for part in parts], whole)  # rank r serves streams r, r + 2


def test_distorting_leaves_the_global_generators_as_they_were():
    settings = DataConfig(name="generated", root="", **DISTORTED)
    image = torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    distort(image, settings, np.full(5, 0.3))
    mix(torch.rand(4, 3, 8, 8, generator=torch.Generator()), torch.arange(4), replace(settings, mixup=1.0), 4, 0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("draw", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_distortions_are_those_of_timm_and_torchvision(draw):
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = DataConfig(name="generated", root="", rand_augment="rand-m9-n3-mstd0.5")
    transform = rand_augment_transform("rand-m9-n3-mstd0.5", {"translate_const": 7, "img_mean": (128, 128, 128)})
    with seeded(int(draw * 2**32)):
        expected = transform(to_pil(image))
    assert np.array_equal(to_pil(distort(image, settings, np.array([draw]))), expected)

    expected = functional.adjust_brightness(to_pil(image), 0.6 + 0.8 * draw)  # draw 0 takes this order
    expected = functional.adjust_contrast(expected, 1.0)
    expected = functional.adjust_saturation(expected, 1.4)
    assert np.array_equal(color_jitter(to_pil(image), 0.4, np.array([0.0, draw, 0.5, 1.0])), expected)


def test_every_operation_of_rand_augment_works_at_every_magnitude():
    image = torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8)
    for magnitude in (0, 1, 5, 9, 10):
        for increasing in (0, 1):
            recipe = f"rand-m{magnitude}-n8-p1-inc{increasing}"
            for number in range(20):
                distort(image, DataConfig(name="generated", root="", rand_augment=recipe), np.array([number / 20]))


def test_grey_images_stay_grey():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    settings = DataConfig(name="generated", root="", **DISTORTED)
    for number in range(50):
        assert distort(image, settings, np.random.default_rng(number).random(5)).shape == (1, 8, 8)


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_images_and_targets_are_mixed_in_the_same_shares(alphas):
    settings = DataConfig(name="generated", root="", **alphas)
    labels, images = torch.arange(6), torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kinds = set()
    for step in range(40):
        mixed, targets = mix(images.clone(), labels, settings, 6, seed=3, step=step)
        again, _ = mix(images.clone(), labels, settings, 6, seed=3, step=step)
        other, _ = mix(images.clone(), labels, settings, 6, seed=4, step=step)
        assert torch.equal(mixed, again)
        assert not torch.equal(mixed, other)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        share = targets[0, 0]
        assert torch.allclose(targets, torch.eye(6) * share + torch.eye(6).flip(0) * (1 - share))
        blended = torch.allclose(mixed, images * share + images.flip(0) * (1 - share), atol=1e-6)
        own, partners = (mixed == images).all(1), (mixed == images.flip(0)).all(1)
        pasted = bool((own | partners).all()) and bool((own.float().mean((1, 2)) - share).abs().max() < 1e-6)
        assert blended or pasted
        kinds.add("mixup" if blended else "cutmix")
    assert kinds == set(alphas)


def test_label_smoothing_in_the_loss_is_timms_smoothing_of_the_targets():
    settings = DataConfig(name="generated", root="", mixup=0.8)
    generator = torch.Generator().manual_seed(0)
    labels, logits = torch.arange(4), torch.randn(4, 5, generator=generator)
    _, targets = mix(torch.zeros(4, 3, 8, 8), labels, settings, 5, seed=0, step=7)
    with seeded(seed_for("mix", 0, 7) % 2**32):
        _, smoothed = Mixup(0.8, label_smoothing=0.1, num_classes=5)(torch.zeros(4, 3, 8, 8), labels)
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), F.cross_entropy(logits, smoothed))


def test_a_run_with_everything_on_resumes_bit_for_bit_and_differs_from_one_with_it_off(tmp_path):
    shards = pack_digits(tmp_path / "shards")
    everything = ["data.mixup=0.8", "data.cutmix=1", "data.rand_augment=rand-m9", "data.color_jitter=0.4"]
    settings = run_config(shards, "train.label_smoothing=0.1", "data.num_workers=2", *everything)
    run(settings, tmp_path / "whole")
    run(run_config(shards, "train.label_smoothing=0.1"), tmp_path / "plain")

    interrupt = Interrupt()

    def stop_at_7(line):
        if line["step"] == 7:
            interrupt.request()

    with pytest.raises(Interrupted):
        run(settings, tmp_path / "stopped", interrupt=interrupt, watch=stop_at_7)
    run(settings, tmp_path / "stopped")

    def end(name: str) -> tuple[list[float], bytes]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], (tmp_path / name / "weights.safetensors").read_bytes()

    assert end("stopped") == end("whole")
    assert end("plain") != end("whole")
    assert len(end("whole")[0]) == 20


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    mixed = run_config(Path("none"), "data.mixup=0.2", "data.cutmix=1")
    with pytest.raises(UserError, match="even number"):
        mix(torch.zeros(3, 1, 8, 8), torch.zeros(3).long(), mixed.data, 10, 0, 0)
    for wrong in ("rand-x9", "augmix-m3", "rand-m9-p2", "rand-mstd", "rand_m9"):
        with pytest.raises(UserError, match=f"rand_augment '{wrong}'"):
            run_config(Path("none"), f"data.rand_augment={wrong}")
    for wrong in ("mixup=0", "cutmix=-1", "color_jitter=2"):
        with pytest.raises(UserError, match=f"data.{wrong.partition('=')[0]}"):
            run_config(Path("none"), f"data.{wrong}")
