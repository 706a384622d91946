"""Which split a shard or a folder belongs to: by whole words anywhere in its name, or as the user says."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from depthmup.data.class_order import describe_class_order
from depthmup.data.errors import UserError
from depthmup.data.index import Index, load_members
from depthmup.data.pack import pack
from depthmup.data.scan import index_shards
from depthmup.data.sources import read_lines
from depthmup.data.splits import split_folder, split_word
from depthmup.launch.cli import cli
from image_sets import make_folder, write_tar


def shards(folder: Path, *names: str) -> Path:
    """One tar of four samples in two classes for each name."""
    for name in names:
        write_tar(folder / name, [(f"{n}.jpg", b"image", b"%d" % (n % 2)) for n in range(4)])
    return folder


def splits_of(index: Index) -> dict[str, list[str]]:
    return {split: [shard.name for shard in of_split] for split, of_split in index.splits.items()}


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("imagenet1k-validation-0000.tar", "validation"),
        ("imagenet-val-000000.tar", "val"),
        ("ImageNetVal_0.tar", "val"),
        ("val/00001.tar", "val"),
        ("val2017.tar", "val"),
        ("Test.tar", "test"),
        ("images-validate-0.tar", "validate"),
        ("holdout/0.tar", "holdout"),
        ("valset-0.tar", "valset"),
        ("training/0.tar", "train"),
        ("test/imagenet-train-0.tar", "train"),
        ("valley-000.tar", None),
        ("testbed-000.tar", None),
        ("interval-3.tar", None),
        ("trainee.tar", None),
        ("étéval.tar", None),
        ("0001.tar", None),
    ],
)
def test_a_split_is_a_whole_word_of_the_last_part_that_has_one(path, word):
    assert split_word(path) == word


def test_two_splits_in_one_name_are_refused_with_the_way_to_say_it():
    with pytest.raises(UserError, match=r"train or val\? Say it with --train PATTERN and --val PATTERN"):
        split_word("train-val-000.tar")


def test_a_folder_of_a_split_says_nothing_else():
    for name in ("train", "Train", "training", "train2017", "train_images", "training-set"):
        assert split_folder(name) == "train"
    for name in ("bullet_train", "valley", "test tube", "trains"):
        assert split_folder(name) is None


@pytest.mark.parametrize(
    ("names", "train", "val", "left_out"),
    [
        (
            ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-0000.tar"],
            ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"],
            ["imagenet1k-validation-0000.tar"],
            [],
        ),
        (
            ["imagenet-train-000000.tar", "imagenet-val-000000.tar"],
            ["imagenet-train-000000.tar"],
            ["imagenet-val-000000.tar"],
            [],
        ),
        (["train/00000.tar", "val/00001.tar"], ["train/00000.tar"], ["val/00001.tar"], []),
        (["train/00000.tar", "val/00000.tar"], ["train/00000.tar"], ["val/00000.tar"], []),
        (["Train/a/0.tar", "Validation/a/0.tar"], ["Train/a/0.tar"], ["Validation/a/0.tar"], []),
        (
            ["valley-000.tar", "testbed-000.tar"],
            ["testbed-000.tar", "valley-000.tar"],
            None,
            ["shards of different names are all train: testbed, valley"],
        ),
        (["a-0.tar", "a-1.tar"], ["a-0.tar", "a-1.tar"], None, []),
        (
            ["train-0.tar", "val-0.tar", "test-0.tar", "test-1.tar"],
            ["train-0.tar"],
            ["val-0.tar"],
            ["2 shards of test, where val is the validation split"],
        ),
        (["train-0.tar", "test-0.tar"], ["train-0.tar"], ["test-0.tar"], []),
        (["images-0.tar", "images-validate-0.tar"], ["images-0.tar"], ["images-validate-0.tar"], []),
        (["0.tar", "test-0.tar"], ["0.tar"], ["test-0.tar"], []),
        (
            ["train-0.tar", "valley-0.tar", "other/0.tar"],
            ["train-0.tar"],
            None,
            ["the shards in other", "1 shard with no word for a split in the name: valley-0.tar"],
        ),
        (
            ["train-0.tar", ".ipynb_checkpoints/train-0-checkpoint.tar", "train/.hidden/1.tar", ".val-0.tar"],
            ["train-0.tar"],
            None,
            [],
        ),
    ],
)
def test_index_puts_shards_into_splits_and_says_what_it_leaves_out(tmp_path, names, train, val, left_out):
    said = []
    index = index_shards(str(shards(tmp_path, *names)), processes=1, say=said.append)
    assert splits_of(index) == {split: of for split, of in (("train", train), ("val", val)) if of}
    assert len(said) == len(left_out)
    for line, expected in zip(said, left_out, strict=True):
        assert line.removeprefix("left out: ").startswith(expected)
        assert "--train PATTERN" in line
    assert Index.load(tmp_path) == index
    index.check_files()
    assert [load_members(index.root, shard).labels.tolist() for shard in index.shards] == [[0, 1, 0, 1]] * len(
        index.shards
    )


def test_the_user_says_which_shards_are_which_split(tmp_path):
    folder = shards(tmp_path, "a-0.tar", "a-1.tar", "holdout/0.tar", "c-0.tar")

    def split(**patterns):
        (folder / "index.json").unlink(missing_ok=True)
        return splits_of(index_shards(str(folder), processes=1, say=said.append, **patterns))

    said = []
    assert split(val=["holdout"]) == {"train": ["a-0.tar", "a-1.tar", "c-0.tar"], "val": ["holdout/0.tar"]}
    assert said == []
    assert split(train=["a-*"], val=["c-0.tar"]) == {"train": ["a-0.tar", "a-1.tar"], "val": ["c-0.tar"]}
    assert said == ["left out: 1 shard that neither --train nor --val names: holdout/0.tar"]
    with pytest.raises(UserError, match=r"index\.json exists and lists c-0\.tar in val, not in train\. Delete it"):
        index_shards(str(folder), train=["a-*", "c-*"], processes=1)
    with pytest.raises(UserError, match=r"--val d-\*: no name matches it, only a-0\.tar, a-1\.tar"):
        split(val=["d-*"])
    with pytest.raises(UserError, match=r"a-0\.tar: both --train and --val name it"):
        split(train=["a-*"], val=["*-0.tar"])


def test_tars_in_folders_that_say_no_split_are_not_merged(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar files in it, but in cats, dogs: index each of these"):
        index_shards(str(shards(tmp_path, "cats/0.tar", "dogs/0.tar")))


def test_the_command_prints_splits_and_classes_with_their_counts(tmp_path):
    folder = shards(tmp_path / "shards", "train-0.tar", "train-1.tar", "validation-0.tar", "test-0.tar")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    result = CliRunner().invoke(cli, ["index", str(folder), "--classes", str(names), "--processes", "1"])
    assert result.exit_code == 0
    assert "left out: 1 shard of test, where validation is the validation split" in result.output
    assert "train has 3 classes: cat 4, dog 4, owl 0\nval has 3 classes: cat 2, dog 2, owl 0\n" in result.output
    assert "train: 8 images in 2 shards\nval: 4 images in 1 shard\n" in result.output


def test_labels_that_count_from_one_are_refused_with_the_cure_which_works(tmp_path):
    write_tar(tmp_path / "train-0.tar", [(f"{n}.jpg", b"image", b"%d" % (n % 5 + 1)) for n in range(20)])
    names, said = ["a", "b", "c", "d", "e"], []
    index_shards(str(tmp_path), processes=1, say=said.append)
    assert said == ["no sample has a label below 1: where labels count from 1, --first-label 1 says so"]
    (tmp_path / "index.json").unlink()
    with pytest.raises(
        UserError, match=r"its labels are 1 to 5, but those of 5 classes count from 0\. .*--first-label 1"
    ):
        index_shards(str(tmp_path), classes=names, processes=1)
    assert not (tmp_path / "index.json").exists()
    index = index_shards(str(tmp_path), classes=names, first_label=1, processes=1)
    load_members.cache_clear()
    assert sorted(set(load_members(index.root, index.shards[0]).labels.tolist())) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="exists and counts labels from 1"):
        index_shards(str(tmp_path), classes=names, processes=1)
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match=r"has the label 1, below --first-label 2"):
        index_shards(str(tmp_path), classes=names, first_label=2, processes=1)


def test_classes_without_a_name_are_refused_but_not_a_single_bad_label(tmp_path):
    samples = [(f"{n}.jpg", b"image", b"%d" % (n % 5)) for n in range(40)]
    write_tar(tmp_path / "train-0.tar", samples)
    with pytest.raises(UserError, match="16 samples with labels up to 4, but 3 names of classes, for labels 0 to 2"):
        index_shards(str(tmp_path), classes=["a", "b", "c"], processes=1)
    write_tar(tmp_path / "train-0.tar", [*samples, ("bad.jpg", b"image", b"99")])
    assert index_shards(str(tmp_path), classes=list("abcde"), processes=1).classes == tuple("abcde")


def test_names_of_classes_are_those_of_the_file_however_it_was_saved(tmp_path):
    shards(tmp_path / "shards", "train-0.tar")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")
    said = CliRunner().invoke(cli, ["index", str(tmp_path / "shards"), "--classes", str(tmp_path / "names.txt")])
    assert "train has 2 classes: cat 2, dog 2\n" in said.output
    assert Index.load(tmp_path / "shards").classes == ("cat", "dog")
    (tmp_path / "shards" / "index.json").unlink()
    with pytest.raises(UserError, match="the name of class 2 is empty"):
        index_shards(str(tmp_path / "shards"), classes=["cat", "", "dog"], processes=1)
    (tmp_path / "names.txt").write_text("cat\x0cfish\ndog\u2028y\n")  # as splitlines would not have it
    assert read_lines(tmp_path / "names.txt") == ["cat\x0cfish", "dog\u2028y"]
    (tmp_path / "names.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"names\.txt: empty: write a line for each name"):
        read_lines(tmp_path / "names.txt")


def tar_of(path: Path, *members: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in members:
            archive.addfile(tarfile.TarInfo(name))


@pytest.mark.parametrize(
    ("members", "cure"),
    [
        (
            ["0.jpg", "1.jpg", "0.cls", "1.cls"],
            r"members of a sample must be adjacent, but those of 0 are not.*--sort=name",
        ),
        (
            ["0.cls", "1.cls", "0.jpg", "1.jpg"],
            r"members of a sample must be adjacent, but those of 0 are not.*--sort=name",
        ),
        (["n01440764.tar", "n01443537.tar"], r"holds other archives, such as n01440764\.tar.*Unpack these"),
        (["0.cls", "1.cls"], "0 has no image"),
    ],
)
def test_a_tar_whose_samples_do_not_stand_together_is_refused_with_the_cure(tmp_path, members, cure):
    tar_of(tmp_path / "train-0.tar", *members)
    with pytest.raises(UserError, match=cure):
        index_shards(str(tmp_path), processes=1)


def test_the_cure_for_labels_after_all_images_works_as_it_is_printed(tmp_path):
    folder = tmp_path / "my shards"
    folder.mkdir()
    write_tar(folder / "train-0.tar", [("0.jpg", b"image", None), ("1.jpg", b"image", None)])
    with tarfile.open(folder / "train-0.tar", "a") as archive:
        for number in range(2):
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"0"))
    with pytest.raises(UserError, match="must be adjacent") as refused:
        index_shards(str(folder), processes=1)
    assert os.system(f"cd '{folder}' && {str(refused.value).partition('Sort it: ')[2]}") == 0
    (folder / "train-0.tar").unlink()
    assert index_shards(str(folder), processes=1).describe() == "2 samples in 1 shard"


@pytest.mark.parametrize(
    ("start", "kind"), [(b"\x1f\x8b\x08\0", "gzip"), (b"PK\x03\x04", "zip"), (b"7z\xbc\xaf", "7z"), (b"Rar!", "rar")]
)
def test_compressed_shards_and_other_archives_are_refused_with_the_cure(tmp_path, start, kind):
    (tmp_path / "train-0.tar").write_bytes(start + b"something" * 99)
    with pytest.raises(UserError, match=f"compressed or archived by {kind}.*unpack it to a .tar first"):
        index_shards(str(tmp_path), processes=1)
    (tmp_path / "train-0.tar").rename(tmp_path / "photos.zip")
    if kind != "gzip":
        with pytest.raises(UserError, match=f"photos.zip: a {kind} archive: unpack it into a folder, and pack that"):
            pack(str(tmp_path / "photos.zip"), tmp_path / "shards")


def test_a_folder_of_compressed_tars_is_refused_with_the_cure(tmp_path):
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \.tar files in it \(train-0\.tar\.gz: unpack them to \.tar files first\)"):
        index_shards(str(tmp_path))


def test_shards_that_cannot_be_written_beside_are_refused_with_the_cure_which_works(tmp_path, monkeypatch):
    folder, writable = shards(tmp_path / "my shards", "train/0.tar", "val/0.tar"), os.access

    def read_only(path, mode):
        return writable(path, mode) and not Path(path).is_relative_to(folder)

    monkeypatch.setattr(os, "access", read_only)
    with pytest.raises(
        UserError, match=r"is not writable.*cp -rs '\S+my shards' links && depthmup index links"
    ) as refused:
        index_shards(str(folder), processes=1)
    command = str(refused.value).partition("index that: ")[2].partition(" && ")[0]
    assert os.system(f"cd {tmp_path} && {command}") == 0
    index = index_shards(str(tmp_path / "links"), processes=1)
    assert splits_of(index) == {"train": ["train/0.tar"], "val": ["val/0.tar"]}
    assert not list(folder.rglob("*.npz"))


def test_sidecars_of_remote_shards_with_one_name_in_two_folders_do_not_meet():
    names = [f"https://host/{split}/00000.tar" for split in ("train", "val")]
    from depthmup.data.index import locate_sidecar

    assert len({locate_sidecar("shards", name) for name in names}) == 2
    assert all(Path(locate_sidecar("shards", name)).parent == Path("shards") for name in names)


# ---------------------------------------------------------------- folders of images


def images(folder: Path, *paths: str) -> str:
    from PIL import Image

    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / path)
    return str(folder)


@pytest.mark.parametrize(
    "paths",
    [
        ["Train/cat/1.jpg", "Train/dog/2.jpg", "Val/cat/3.jpg", "Val/dog/4.jpg"],
        ["training/cat/1.jpg", "training/dog/2.jpg", "validation/cat/3.jpg", "validation/dog/4.jpg"],
        ["train/images/cat/1.jpg", "train/images/dog/2.jpg", "val/images/cat/3.jpg", "val/images/dog/4.jpg"],
        ["train2017/cat/1.jpg", "train2017/dog/2.jpg", "val2017/cat/3.jpg", "val2017/dog/4.jpg"],
        [
            "set/images/train/cat/1.jpg",
            "set/images/train/dog/2.jpg",
            "set/images/test/cat/3.jpg",
            "set/images/test/dog/4.jpg",
        ],
        ["img_train/cat/1.jpg", "img_train/dog/2.jpg", "img_val/cat/3.jpg", "img_val/dog/4.jpg"],
        ["train_small/cat/1.jpg", "train_small/dog/2.jpg", "val_small/cat/3.jpg", "val_small/dog/4.jpg"],
        [
            *("seg_train/seg_train/cat/1.jpg", "seg_train/seg_train/dog/2.jpg"),
            *("seg_test/seg_test/cat/3.jpg", "seg_test/seg_test/dog/4.jpg"),
        ],
        ["cat/train/1.jpg", "cat/val/3.jpg", "dog/train/2.jpg", "dog/val/4.jpg"],
        ["cat/train/images/1.jpg", "cat/test/3.jpg", "dog/train/2.jpg", "dog/test/images/4.jpg"],
    ],
)
def test_the_usual_names_of_folders_are_splits_and_no_classes(tmp_path, paths):
    index, left_out = pack(images(tmp_path / "images", *paths), tmp_path / "shards")
    assert index.classes == ("cat", "dog")
    assert {split: sum(s.samples for s in of) for split, of in index.splits.items()} == {"train": 2, "val": 2}
    assert not left_out


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["cat/train/1.jpg", "cat/2.jpg", "dog/val/3.jpg"], ("cat", "dog")),  # not all images are in a split
        (["cat/left/1.jpg", "cat/val/2.jpg", "dog/left/3.jpg"], ("cat", "dog")),
        (["bullet_train/1.jpg", "steam_train/2.jpg", "bus/3.jpg"], ("bullet_train", "bus", "steam_train")),
        (["a_train/1.jpg", "a_val/2.jpg", "b_train/3.jpg", "b_val/4.jpg"], ("a_train", "a_val", "b_train", "b_val")),
        (["train/train/1.jpg", "train/train/2.jpg", "val/train/3.jpg"], ("train",)),
    ],
)
def test_what_only_looks_like_a_split_stays_a_class(tmp_path, paths, classes):
    assert pack(images(tmp_path / "images", *paths), tmp_path / "shards")[0].classes == classes


def test_folders_that_hold_the_same_folders_are_said_to_look_like_splits(tmp_path):
    source = images(tmp_path / "images", *(f"{top}/{name}/1.jpg" for top in ("tr", "va") for name in ("cat", "dog")))
    index, said = pack(source, tmp_path / "shards")
    assert index.classes == ("tr", "va")
    assert said == [
        "tr, va are packed as classes, and hold folders of the same names (cat, dog): where they are splits, say it "
        "with --train PATTERN and --val PATTERN"
    ]
    assert pack(source, tmp_path / "again", train=["tr"], val=["va"])[0].classes == ("cat", "dog")
    index, said = pack(source, tmp_path / "half", train=["tr"])
    assert (index.describe(), said) == (
        "2 samples in 1 shard",
        ["2 files left out: in va, which --train does not name"],
    )


@pytest.mark.parametrize("share", [0.01, 0.99, float("nan"), 1.0, -0.1])
def test_a_share_that_leaves_a_split_empty_is_refused(tmp_path, share):
    source = images(tmp_path / "images", *(f"cat/{n}.jpg" for n in range(6)))
    with pytest.raises(UserError, match=r"^validation_share .*: (state a share|expected a number from 0)"):
        pack(source, tmp_path / "shards", validation_share=share)
    assert not (tmp_path / "shards").exists()


def test_a_shard_without_a_readable_image_shows_no_rate(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.jpg").write_bytes(b"no image")
    result = CliRunner().invoke(cli, ["pack", str(tmp_path / "images"), str(tmp_path / "shards")])
    assert not isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "name",
    [
        *("$Recycle.Bin", "RECYCLER", "~snapshot", "@Recently-Snapshot", "__macosx", "Network Trash Folder"),
        *("system volume information", "FOUND.000", "Lost+Found", "#Recycle"),
    ],
)
def test_folders_of_systems_are_no_classes_however_they_are_written(tmp_path, name):
    source = make_folder(tmp_path / "images", 4, classes=2)
    shutil.copytree(source / "class0", source / name)
    index, said = pack(str(source), tmp_path / "out")
    assert index.classes == ("class0", "class1")
    assert said == [f"2 files left out: in the hidden folder {name}"]


@pytest.mark.parametrize("name", ["train_dataset", "train-files", "TrainPNG", "train_folder", "train pics"])
def test_words_for_what_any_folder_holds_make_no_class_of_a_split(tmp_path, name):
    source = make_folder(tmp_path / "images" / name, 4, classes=2)
    make_folder(source.parent / "val", 4, classes=2)
    index, _ = pack(str(source.parent), tmp_path / "out")
    assert (sorted(index.splits), index.classes) == (["train", "val"], ("class0", "class1"))


def test_hidden_folders_and_files_are_no_classes_and_no_images_and_are_counted(tmp_path):
    source = images(
        tmp_path / "images",
        "train/cat/1.jpg",
        "train/cat/._1.jpg",
        "train/dog/2.jpg",
        "train/.ipynb_checkpoints/1-checkpoint.jpg",
        "train/dog/.ipynb_checkpoints/2-checkpoint.jpg",
        "train/dog/@eaDir/2.jpg",
        "__MACOSX/train/cat/1.jpg",
        "val/cat/3.jpg",
    )
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(source, "images")
    for given in (source, str(tmp_path / "images.tar")):
        index, left_out = pack(given, tmp_path / "shards" / Path(given).name)
        assert index.classes == ("cat", "dog")
        assert index.describe() == "3 samples in 2 shards"
        assert sorted(left_out) == [
            "1 file left out: hidden files",
            "1 file left out: in the hidden folder @eaDir",
            "1 file left out: in the hidden folder __MACOSX",
            "2 files left out: in the hidden folder .ipynb_checkpoints",
        ]


def test_the_user_says_which_folders_are_which_split(tmp_path):
    source = images(tmp_path / "images", "learn/cat/1.jpg", "learn/dog/2.jpg", "check/cat/3.jpg", "old/cat/4.jpg")
    result = CliRunner().invoke(cli, ["pack", source, str(tmp_path / "s"), "--train", "learn", "--val", "check"])
    assert result.exit_code == 0
    assert "train has 2 classes: cat 1, dog 1\nval has 2 classes: cat 1, dog 0\n" in result.output
    assert "train: 2 images in 1 shard\nval: 1 image in 1 shard\n" in result.output
    assert "1 file left out: in old" in result.output
    again = CliRunner().invoke(cli, ["pack", source, str(tmp_path / "s"), "--train", "learn", "--val", "old"])
    assert "holds another pack" in str(again.exception)


def test_a_split_of_one_class_with_a_number_for_its_name_keeps_it(tmp_path):
    source = images(tmp_path / "images", "train/1/1.jpg", "train/10/2.jpg", "val/1/3.jpg")
    index, left_out = pack(source, tmp_path / "shards")
    assert (index.describe("train"), index.describe("val"), left_out) == (
        "2 samples in 1 shard",
        "1 sample in 1 shard",
        [],
    )


def test_a_tar_beside_images_does_not_make_shards_of_them(tmp_path):
    source = images(tmp_path / "images", "cat/1.jpg", "dog/2.jpg")
    tar_of(tmp_path / "images" / "backup.tar", "1.jpg")
    index, left_out = pack(source, tmp_path / "shards")
    assert (index.classes, len(left_out)) == (("cat", "dog"), 1)


def test_a_tar_of_tars_is_refused_with_the_cure(tmp_path):
    tar_of(tmp_path / "ILSVRC2012_img_train.tar", "n01440764.tar", "n01443537.tar")
    with pytest.raises(UserError, match=r"no images.*2 files left out: \.tar.*Unpack each into a folder of its class"):
        pack(str(tmp_path / "ILSVRC2012_img_train.tar"), tmp_path / "shards")


# ---------------------------------------------------------------- class-sorted shards


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_labels_sorted_by_class_are_told_from_shuffled_ones(classes):
    ordered = np.repeat(np.arange(classes), 40)
    random = np.random.default_rng(0)
    assert "sorted by class" in describe_class_order(ordered)
    in_shards = np.concatenate([random.permutation(part) for part in np.split(ordered, max(2, classes // 10))])
    assert "sorted by class" in describe_class_order(in_shards)  # shuffled inside shards of few classes
    for _ in range(20):
        assert describe_class_order(random.permutation(ordered)) is None
    assert describe_class_order(np.tile(np.arange(classes), 40)) is None  # in turn


def test_few_samples_one_class_and_rare_classes_are_not_called_sorted():
    random = np.random.default_rng(0)
    assert describe_class_order(np.array([0, 0, 1, 1])) is None
    assert describe_class_order(np.zeros(5000, int)) is None
    for _ in range(50):
        assert describe_class_order((random.random(2000) < 0.01).astype(int)) is None


def test_index_and_inspect_say_that_shards_are_sorted_and_the_cure_shuffles_them(tmp_path):
    source = make_folder(tmp_path / "images", 240, classes=12)
    files = sorted(source.rglob("*.png"))
    for number in range(4):
        part = files[number * 60 : number * 60 + 60]
        write_tar(
            tmp_path / "sorted" / f"train-{number}.tar",
            [(f"{f.parent.name}_{f.name}", f.read_bytes(), f.parent.name.removeprefix("class").encode()) for f in part],
        )
    run = CliRunner().invoke
    folder, shuffled = str(tmp_path / "sorted"), str(tmp_path / "shuffled")
    for command in (["index", folder], ["inspect", folder]):
        result = run(cli, [*command, "--processes", "1"])
        assert result.exit_code == 0
        assert "train: sorted by class" in result.output
        assert f"depthmup pack {folder} OUT" in result.output
    assert run(cli, ["pack", folder, shuffled, "--processes", "1"]).exit_code == 0
    before, after = Index.load(folder), Index.load(shuffled)
    assert (after.classes, after.describe()) == (before.classes, "240 samples in 1 shard")
    packed = load_members(after.root, after.shards[0])
    labels = {
        name: label
        for shard in before.shards
        for name, label in zip(
            *(getattr(load_members(before.root, shard), key).tolist() for key in ("names", "labels")), strict=True
        )
    }
    assert dict(zip(packed.names.tolist(), packed.labels.tolist(), strict=True)) == labels
    assert "sorted" not in run(cli, ["inspect", shuffled, "--processes", "1"]).output
