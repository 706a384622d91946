"""pack, index and inspect: whole shards or none, nothing lost silently, and the same shards after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from image_sets import make_folder
from PIL import Image

from data import pack as packing
from data.errors import UserError
from data.index import Index, Span, load_members
from data.inspect import inspect_split
from data.pack import pack
from data.reader import read_sample
from data.scan import index_shards
from launch.cli import cli


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_packed_shards_keep_the_files_bytes_and_labels(tmp_path):
    source = make_folder(tmp_path / "images", 40, suffix="jpg")
    index, bad = pack(str(source), tmp_path / "shards", shard_samples=15, validation_share=0.25)
    assert not bad
    assert {split: [s.samples for s in shards] for split, shards in index.splits.items()} == {
        "train": [15, 15],
        "val": [10],
    }
    originals = {path.read_bytes(): path.parent.name for path in source.rglob("*.jpg")}
    for shard in index.shards:
        for number in range(shard.samples):
            sample = read_sample(index, Span(shard, 0, shard.samples), number)
            assert originals.pop(sample.image) == index.classes[sample.label]
    assert not originals
    assert sorted(contents(tmp_path / "shards")) == sorted(
        [
            "index.json",
            "pack.json",
            *(f"{n}.{e}" for n in ("train-000000", "train-000001", "val-000000") for e in ("tar", "index.npz")),
        ]
    )


def test_a_killed_pack_leaves_whole_shards_and_the_next_one_finishes_the_same(tmp_path):
    source = make_folder(tmp_path / "images", 400)
    arguments = [str(source), str(tmp_path / "killed"), "--shard-samples", "20", "--processes", "2"]
    runner = "from launch.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", runner, "pack", *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "index.json").exists()
    finished = list((tmp_path / "killed").glob("train-*.tar"))
    assert 0 < len(finished) < 20
    for path in finished:
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) == 40  # an image and a label each
    recorded = [path for path in finished if packing.record_path(path).exists()]
    times = [path.stat().st_mtime_ns for path in recorded]
    with pytest.raises(UserError, match=r"another pack \(then --shard-samples 20, now 21"):
        pack(str(source), tmp_path / "killed", shard_samples=21)
    pack(str(source), tmp_path / "killed", shard_samples=20)
    assert times == [path.stat().st_mtime_ns for path in recorded]
    pack(str(source), tmp_path / "whole", shard_samples=20, processes=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_second_pack_changes_nothing_and_says_so_or_refuses_naming_what_differs(tmp_path):
    source, out = make_folder(tmp_path / "images", 9), tmp_path / "shards"
    listing = tmp_path / "list"
    listing.write_text("0000.png class0\n")

    def run(*options):
        ran = CliRunner().invoke(cli, ["pack", str(source), str(out), *options])
        return ran.exit_code, ran.output if ran.exit_code == 0 else str(ran.exception)

    assert run("--shard-samples", "5")[1].endswith("train: 9 images in 2 shards\n")
    before = contents(out)
    assert run("--shard-samples", "5") == (0, "already packed: 9 samples in 2 shards\ntrain: 9 images in 2 shards\n")
    for options, difference in (
        (("--shard-samples", "6"), "then --shard-samples 5, now 6"),
        (("--shard-samples", "5", "--resize", "20"), "then --resize unset, now 20; then --quality unset, now 90"),
        (("--shard-samples", "5", "--validation-list", str(listing)), f"then --validation-list unset, now {listing}"),
        (("--shard-samples", "5", "--seed", "1"), "then --seed 0, now 1"),
    ):
        code, message = run(*options)
        assert code != 0
        assert difference in message
        assert message.endswith("Pack into another folder, or delete this one first")
    make_folder(source, 10)
    assert f"then 9 images of {source}, now 10 others" in run("--shard-samples", "5")[1]
    assert contents(out) == before
    (out / "pack.json").unlink()
    assert "not packed by this command" in run("--shard-samples", "5")[1]


def test_unreadable_files_are_named_and_too_many_end_the_pack(tmp_path):
    source = make_folder(tmp_path / "images", 20)
    for number in range(3):
        (source / "class0" / f"broken{number}.png").write_bytes(b"\x89PNG broken" * number)
    _, bad = pack(str(source), tmp_path / "shards")
    assert sorted(bad) == [f"class0/broken{number}.png: UnidentifiedImageError" for number in range(3)]
    with pytest.raises(UserError, match="more than 2 unreadable"):
        pack(str(source), tmp_path / "other", max_bad=2)


def test_imagenet_recipe_flat_validation_images_by_list_class_names_and_resize(tmp_path):
    source = make_folder(tmp_path / "images" / "train", 12, size=(90, 60), suffix="JPEG").parent
    (source / "val").mkdir()
    for number, image in enumerate(sorted(source.rglob("*.JPEG"))[:4]):
        shutil.copy(image, source / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    listing = tmp_path / "solution.csv"
    listing.write_text(
        "ImageId,PredictionString\n"
        + "".join(f"ILSVRC2012_val_{number:08d},class{number % 3} 1 2 3 4\n" for number in range(4))
    )
    names = tmp_path / "names.txt"
    names.write_text("class0 tench, Tinca tinca\nclass1 goldfish\nclass2 crane\n")
    index, _ = pack(
        str(source), tmp_path / "shards", validation_list=listing, class_names=names, resize=30, shard_samples=5
    )
    assert index.classes == ("class0 tench, Tinca tinca", "class1 goldfish", "class2 crane")
    assert [sum(s.samples for s in index.splits[split]) for split in ("train", "val")] == [12, 4]
    assert sorted(load_members(index.root, index.splits["val"][0]).labels.tolist()) == [0, 0, 1, 2]
    found = inspect_split(index, "train", processes=1)
    assert set(found.sizes) == {(45, 30)}
    listing.write_text("missing.JPEG class0\n")
    with pytest.raises(UserError, match="not in"):
        pack(str(source), tmp_path / "other", validation_list=listing)


def test_a_tar_and_size_limits_give_the_images_of_the_folder(tmp_path):
    source = make_folder(tmp_path / "images", 30)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(source, "images")
    index, _ = pack(str(tmp_path / "images.tar"), tmp_path / "shards", shard_bytes=2000)
    images = [read_sample(index, Span(s, 0, s.samples), n).image for s in index.shards for n in range(s.samples)]
    assert sorted(images) == sorted(path.read_bytes() for path in source.rglob("*.png"))
    assert all(load_members(index.root, s).sizes.sum() <= 2000 for s in index.shards)
    with tarfile.open(tmp_path / "images.tgz", "w:gz") as archive:
        archive.add(source, "images")
    with pytest.raises(UserError, match="uncompressed"):
        pack(str(tmp_path / "images.tgz"), tmp_path / "refused")


def test_indexing_existing_shards_gives_packs_own_index_and_inspect_reports(tmp_path):
    index, _ = pack(
        str(make_folder(tmp_path / "images", 30)), tmp_path / "shards", shard_samples=8, validation_share=0.2
    )
    before = contents(tmp_path / "shards")
    for name in before:
        if name.endswith((".npz", "index.json")):
            (tmp_path / "shards" / name).unlink()
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(index.classes))
    runner = CliRunner()
    ran = runner.invoke(cli, ["index", str(tmp_path / "shards"), "--classes", str(classes), "--processes", "1"])
    assert ran.exit_code == 0, ran.output
    assert contents(tmp_path / "shards") == before
    ran = runner.invoke(cli, ["index", str(tmp_path / "shards"), "--classes", str(classes)])
    assert "already indexed: 30 samples in 4 shards" in ran.output
    classes.write_text("a\nb\nc")
    ran = runner.invoke(cli, ["index", str(tmp_path / "shards"), "--classes", str(classes)])
    assert "index.json exists and has 3 classes, other than those given" in str(ran.exception)
    sheet = tmp_path / "sheet.png"
    ran = runner.invoke(cli, ["inspect", str(tmp_path / "shards"), "--sheet", str(sheet), "--processes", "1"])
    assert ran.exit_code == 0, ran.output
    assert "24 samples in 3 shards" in ran.output
    assert Image.open(sheet).size == (960, 576)
    tar = tmp_path / "shards" / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[load_members(index.root, index.shards[0]).offsets[2]] ^= 0xFF  # the PNG's first byte
    tar.write_bytes(content)
    ran = runner.invoke(cli, ["inspect", str(tmp_path / "shards"), "--processes", "1"])
    assert ran.exit_code == 1
    name = load_members(index.root, index.shards[0]).names[2].decode()
    assert f"bad: train-000000.tar: {name}: not a readable image" in ran.output.replace("\n", "")


def test_an_index_of_a_pattern_refuses_what_is_missing_or_no_tar(tmp_path):
    pack(str(make_folder(tmp_path / "images", 30)), tmp_path / "shards", shard_samples=8)
    pattern = str(tmp_path / "shards" / "train-{000000..000004}.tar")
    with pytest.raises(UserError, match=r"train-000004.tar: no such file"):
        index_shards(pattern, tmp_path / "shards2")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "a.tar").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match="not a whole tar"):
        index_shards(str(tmp_path / "garbage"), processes=1)


def test_a_missing_folder_and_one_without_shards_are_told_apart_with_the_way_on(tmp_path):
    (tmp_path / "empty").mkdir()
    pack(str(make_folder(tmp_path / "images", 9)), tmp_path / "shards")
    (tmp_path / "shards" / "index.json").unlink()
    for name, of_index, of_inspect in (
        ("nowhere", "no such folder. Name a folder of .tar files", "no such folder. Make shards"),
        ("empty", "no .tar files in it. Make some", "no index.json and no .tar files in it. Make shards"),
        ("shards", None, "shards: .tar files, but no index.json. Make it with 'depthmup index"),
    ):
        with pytest.raises(UserError, match=of_inspect):
            Index.load(tmp_path / name)
        if of_index:
            with pytest.raises(UserError, match=of_index):
                index_shards(str(tmp_path / name))
    index_shards(str(tmp_path / "shards"), processes=1)
    shutil.copy(tmp_path / "shards" / "train-000000.tar", tmp_path / "shards" / "train-000001.tar")
    with pytest.raises(UserError, match=r"does not list train-000001\.tar. Delete it to index again"):
        index_shards(str(tmp_path / "shards"))


def test_an_index_that_names_files_outside_its_folder_needs_trust(tmp_path):
    index, _ = pack(str(make_folder(tmp_path / "images", 10)), tmp_path / "shards")
    path = tmp_path / "shards" / "index.json"
    raw = json.loads(path.read_text())
    for name in ("../shards/train-000000.tar", str(Path(index.root).resolve() / "train-000000.tar")):
        raw["splits"]["train"][0]["name"] = name
        path.write_text(json.dumps(raw))
        with pytest.raises(UserError, match=r"data\.trust"):
            Index.load(index.root)
        Index.load(index.root, trust=True).check_files()
    for name in ("pipe:touch owned", "file:///etc/passwd"):
        raw["splits"]["train"][0]["name"] = name
        path.write_text(json.dumps(raw))
        with pytest.raises(UserError):
            Index.load(index.root, trust=True).check_files()
    assert not Path("owned").exists()
