"""mean and std: one number for all channels or one for each; a network exported with them gets the same pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from train_configs import run_config

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
from timm.data import create_transform

from depthmup.data.batch import Batch, to_float
from depthmup.data.config import DataConfig
from depthmup.data.decode import center_crop, from_array, to_pil
from depthmup.data.distort import distort
from depthmup.launch.export import describe_preprocessing
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.reading import from_plain, read_yaml, to_plain, to_yaml

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def settings(**options) -> DataConfig:
    return DataConfig(name="x", root="", **options)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels_last", [False, True])
def test_each_channel_is_normalised_by_its_own_numbers(channels_last):
    images = random_images(4, 3, 5, 5)
    found, _ = to_float(Batch(images, torch.zeros(4)), settings(mean=MEAN, std=STD), "cpu", channels_last)
    for channel in range(3):
        expected = (images[:, channel] / 255 - MEAN[channel]) / STD[channel]
        assert torch.allclose(found[:, channel], expected, atol=1e-6)


def test_one_number_is_the_same_as_that_number_for_each_channel():
    batch = Batch(random_images(4, 3, 5, 5), torch.zeros(4))
    one, _ = to_float(batch, settings(mean=0.3, std=0.38), "cpu")
    assert torch.allclose(one, to_float(batch, settings(mean=(0.3,) * 3, std=(0.38,) * 3), "cpu")[0], atol=1e-6)
    assert torch.allclose(one, to_float(batch, settings(mean=(0.3,) * 3, std=0.38), "cpu")[0], atol=1e-6)


def plain(**data) -> RunConfig:
    raw = to_plain(run_config("x"))
    return from_plain(RunConfig, raw | {"data": raw["data"] | data}, "test")


def test_numbers_that_are_not_one_for_each_channel_are_refused():
    with pytest.raises(Exception, match=r"data\.mean has 2 numbers, but images have 1 channel"):
        plain(mean=[0.3, 0.4])
    for std in ([], [0.2, 0.0, 0.2]):
        with pytest.raises(Exception, match=r"data\.std"):
            plain(std=std)


def test_mean_and_std_survive_a_file_and_are_part_of_the_identity(tmp_path):
    given = plain(mean=[0.4], std=[0.2])
    (tmp_path / "config.yaml").write_text(to_yaml(given))
    read = from_plain(RunConfig, read_yaml(tmp_path / "config.yaml"), "test")
    assert read.data.mean == 0.4
    assert (
        run_hash(read) == run_hash(given) == run_hash(plain(mean=0.4, std=0.2)) != run_hash(plain(mean=0.41, std=0.2))
    )
    raw = to_plain(given) | {"model": {**to_plain(given.model), "in_channels": 3}}
    in_colours = [raw | {"data": raw["data"] | {"mean": mean}} for mean in ([0.4, 0.4, 0.4], [0.4, 0.4, 0.5])]
    assert [from_plain(RunConfig, each, "test").data.mean for each in in_colours] == [0.4, (0.4, 0.4, 0.5)]


def test_rand_augment_fills_with_the_mean_of_each_channel():
    image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    recipe = {"rand_augment": "rand-m10-n8-p1-tweights", "mean": (0.0, 0.5, 1.0)}
    filled = [distort(image, settings(**recipe), np.array([n / 40])) for n in range(40)]
    assert any(((picture[0] == 0) & (picture[1] == 128) & (picture[2] == 255)).any() for picture in filled)
    grey = distort(image[:1], settings(rand_augment="rand-m9-n2", mean=(0.25,)), np.array([0.3]))
    assert grey.shape == (1, 16, 16)


@pytest.mark.parametrize("shape", [(3, 90, 60), (3, 50, 75), (3, 32, 32), (3, 20, 31)])
def test_timm_makes_of_a_picture_what_an_evaluation_here_does(shape):
    size = 32
    config = run_config("x")
    config = replace(
        config,
        model=replace(config.model, image_size=size, in_channels=3),
        data=settings(mean=MEAN, std=STD, num_streams=1),
    )
    wave = np.add.outer(np.arange(shape[1]), np.arange(shape[2]))[..., None] * np.array([1, 2, 3])
    image = from_array((wave % 256).astype(np.uint8))
    ours = center_crop(image, size, "pil")[None]
    ours, _ = to_float(Batch(ours, torch.zeros(1)), config.data, "cpu")
    arguments = {key: value for key, value in describe_preprocessing(config).items() if key != "num_classes"}
    theirs = create_transform(**arguments)(to_pil(image))
    assert ours.shape[1:] == theirs.shape
    assert (ours[0] - theirs).abs().mean() < 0.2 * theirs.std()  # an odd margin is cut before or after the resize
    if shape[1] == shape[2]:
        assert torch.allclose(ours[0], theirs, atol=1e-5)


def test_imagenets_recipes_have_imagenets_mean_and_std():
    recipes = sorted(Path("configs").glob("imagenet*.yaml"))
    assert recipes
    for recipe in recipes:
        data = from_plain(RunConfig, read_yaml(recipe), str(recipe)).data
        assert (data.mean, data.std) == (MEAN, STD)
