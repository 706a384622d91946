"""pack, index and inspect: whole shards or none, nothing lost silently, and the same shards after a kill."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from command_line import invoke
from depthmup.data import pack as packing
from depthmup.data.errors import UserError
from depthmup.data.images import convert_image
from depthmup.data.index import Index, Span, load_members
from depthmup.data.inspect import inspect_split
from depthmup.data.pack import pack
from depthmup.data.reader import read_sample
from depthmup.data.scan import index_shards, map_in_processes
from depthmup.launch.cli import cli
from image_sets import make_folder


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


@pytest.mark.parametrize("content", ["", '{"listing"', "[]", "7", '{"name": "bundle"}', '{"options": 1}', "\x00\x00"])
def test_what_another_program_or_a_full_disk_left_as_pack_json_is_named_and_nothing_is_changed(tmp_path, content):
    source, out = make_folder(tmp_path / "images", 4), tmp_path / "out"
    out.mkdir()
    (out / "pack.json").write_text(content)
    with pytest.raises(UserError, match=r"out/pack\.json: damaged, or another program's.*pack into another folder"):
        pack(str(source), out)
    assert contents(out) == {"pack.json": content.encode()}


@pytest.mark.parametrize("content", ["", '{"shard": nul', '{"shard": {"name": "a"}, "bad": []}', "[]", "{}"])
def test_a_damaged_record_of_a_shard_has_that_shard_packed_again(tmp_path, monkeypatch, content):
    source, out = make_folder(tmp_path / "images", 4), tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(Index, "save", lambda index: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(str(source), out)
    (record,) = (path for path in out.iterdir() if path.suffix == ".json" and path.name != "pack.json")
    record.write_text(content)
    assert pack(str(source), out)[0].describe() == "4 samples in 1 shard"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "data.source=photos.tar",
            "data.source photos.tar would do nothing: {} holds what was packed of sklearn:digits: ",
        ),
        (
            "data.validation_share=0.5",
            "data.validation_share 0.5 would do nothing: {} was packed with 0.2: state that, or",
        ),
    ],
)
def test_shards_of_another_source_or_share_than_the_run_states_are_refused(study_file, digits, setting, message):
    refused = invoke("train", study_file, setting).exception
    assert isinstance(refused, UserError)
    assert message.format(digits) in str(refused)


def test_a_killed_pack_leaves_whole_shards_and_the_next_one_finishes_the_same(tmp_path):
    source = make_folder(tmp_path / "images", 400)
    arguments = [str(source), str(tmp_path / "killed"), "--shard-samples", "20", "--processes", "2"]
    runner = "from depthmup.launch.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", runner, "pack", *arguments], start_new_session=True)
    deadline = time.monotonic() + 300
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
    assert sorted(bad) == [
        f"left out, not readable: class0/broken{number}.png: not a readable image (UnidentifiedImageError)"
        for number in range(3)
    ]
    for _ in range(2):  # the second call finds nothing left to pack, and yet must not write the index
        with pytest.raises(UserError, match=r"more than 2 unreadable.*raise --max-bad"):
            pack(str(source), tmp_path / "other", max_bad=2)
    assert not (tmp_path / "other" / "index.json").exists()
    assert len(pack(str(source), tmp_path / "other", max_bad=3)[1]) == 3


def test_pack_leaves_out_what_training_could_not_read(tmp_path):
    """A file that is cut in its middle, one of another format than its name says, and what PIL would give to others."""
    source = make_folder(tmp_path / "images", 9, size=(120, 90), suffix="jpg")
    whole = (source / "class0" / "0000.jpg").read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name, content in (("cut", whole[: len(whole) // 2]), ("postscript", postscript)):
        (source / "class0" / f"{name}.jpg").write_bytes(content)
    for resize in (None, 20):
        index, bad = pack(str(source), tmp_path / f"shards{resize}", resize=resize)
        assert [line.partition(" (")[0] for line in sorted(bad)] == [
            f"left out, not readable: class0/{name}.jpg: not a readable image" for name in ("cut", "postscript")
        ]
        assert index.shards[0].samples == 9
        assert "UnidentifiedImageError" in max(bad)  # the postscript: PIL does not even look into it


def test_resize_scales_16_bits_to_8_as_training_does():
    ramp = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, "png")
    small = Image.open(io.BytesIO(convert_image(content.getvalue(), 32, 95)))
    assert abs(np.asarray(small).mean() - (ramp >> 8).mean()) < 1


def tree(root: Path, *paths: str) -> Path:
    """Files of these paths below `root`: images of different bytes, or text."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".jpg", ".gif")):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / path, "gif" if path.endswith("gif") else "jpeg")
        else:
            (root / path).write_text("text")
    return root


@pytest.mark.parametrize(
    ("paths", "train", "val", "left_out"),
    [
        pytest.param(
            ["train/dog/1.jpg", "valid/dog/2.jpg", "test/dog/3.jpg"],
            {"dog": 1},
            {"dog": 1},
            ["1 file left out: in test, where valid is the validation split"],
            id="a test split is not merged into valid",
        ),
        pytest.param(["train/a/1.jpg", "test/a/2.jpg"], {"a": 1}, {"a": 1}, [], id="test alone is the split val"),
        pytest.param(
            ["train/1.jpg", "bus/2.jpg", "bus/3.jpg"], {"bus": 2, "train": 1}, {}, [], id="a class may be called train"
        ),
        pytest.param(
            ["cats/black/1.jpg", "dogs/black/2.jpg", "dogs/3.jpg"],
            {"cats": 1, "dogs": 2},
            {},
            [],
            id="the class is the first folder, not the last",
        ),
        pytest.param(
            ["set/data/train/a/val/1.jpg", "set/data/val/a/2.jpg", "set/logo.jpg"],
            {"a": 1},
            {"a": 1},
            ["1 file left out: in no class folder"],
            id="folders above the splits do not count, and below the class there are none",
        ),
        pytest.param(
            ["train/a/1.jpg", "val/2.jpg", "val/3.jpg", "extra/b/4.jpg", "train/5.jpg"],
            {"a": 1},
            {},
            [
                "2 files left out: in val, but in no class folder (--validation-list names the class of such images)",
                "1 file left out: in extra, beside the folders of the splits (train, val)",
                "1 file left out: in train, but in no class folder (--validation-list names the class of such images)",
            ],
            id="images without a class are counted",
        ),
        pytest.param(
            ["a/1.jpg", "b/2.gif", "b/3.jpg", "b/notes.txt", "b/.jpg", "4.jpg"],
            {"a": 1, "b": 1},
            {},
            [
                "1 file left out: .gif, where jpg, jpeg, png, webp, bmp are packed",
                "1 file left out: .txt, where jpg, jpeg, png, webp, bmp are packed",
                "1 file left out: in no class folder",
                "1 file left out: no extension, where jpg, jpeg, png, webp, bmp are packed",
            ],
            id="other files are counted by kind",
        ),
    ],
)
def test_every_image_has_the_split_and_class_of_its_folders_or_is_counted(tmp_path, paths, train, val, left_out):
    source = tree(tmp_path / "images", *paths)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(source, "images")
    for given in (source, tmp_path / "images.tar"):
        index, lines = pack(str(given), tmp_path / "shards" / given.name)
        packed = {
            split: Counter(index.classes[label] for s in shards for label in load_members(index.root, s).labels)
            for split, shards in index.splits.items()
        }
        assert packed == {split: counts for split, counts in (("train", train), ("val", val)) if counts}
        assert sorted(lines) == sorted(left_out)


def test_links_and_odd_files_of_a_source_are_followed_once_or_counted_and_nothing_hangs(tmp_path):
    source = tree(tmp_path / "images", "a/1.jpg", "__misc__/2.jpg", "café/3.jpg", "folder.jpg/4.jpg")
    os.symlink("/nowhere.jpg", source / "a" / "broken.jpg")
    os.symlink("..", source / "a" / "up")
    os.symlink(tree(tmp_path / "elsewhere", "5.jpg"), source / "linked")
    os.mkfifo(source / "a" / "pipe.jpg")
    os.mkdir(os.fsencode(source) + b"/caf\xe9")
    shutil.copy(source / "a" / "1.jpg", os.fsencode(source) + b"/caf\xe9/6.jpg")
    index, lines = pack(str(source), tmp_path / "shards")
    assert index.classes == ("__misc__", "a", "caf\\xe9", "café", "folder.jpg", "linked")
    assert sorted(load_members(index.root, index.shards[0]).labels.tolist()) == list(range(6))
    assert not inspect_split(index, "train", processes=1).bad
    assert sorted(lines) == [
        f"1 file left out: {source}/a/broken.jpg, a broken link or no plain file",
        f"1 file left out: {source}/a/pipe.jpg, a broken link or no plain file",
        f"1 file left out: {source}/a/up, a link to a folder above it",
    ]


def test_a_pack_that_packs_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        pack(str(tmp_path / "nowhere"), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_processes_that_help_end_at_ctrl_c_without_a_word_and_one_that_is_killed_is_said():
    assert list(map_in_processes(signal.getsignal, 2, [signal.SIGINT] * 4)) == [signal.SIG_DFL] * 4
    with pytest.raises(UserError, match=r"one of 2 processes was killed, .* memory: --processes says how many"):
        list(map_in_processes(signal.raise_signal, 2, [signal.SIGKILL] * 4))


def test_two_packs_into_one_folder_do_not_meet(tmp_path):
    source = make_folder(tmp_path / "images", 9)
    with packing.claim_folder(tmp_path / "shards"), pytest.raises(UserError, match="another process is packing"):
        pack(str(source), tmp_path / "shards")
    pack(str(source), tmp_path / "shards")


def test_a_folder_that_lost_a_shard_is_not_called_done(tmp_path):
    source, shards = make_folder(tmp_path / "images", 9), tmp_path / "shards"
    pack(str(source), shards, shard_samples=5)
    for name in ("train-000001.tar", "train-000001.index.npz"):
        content = (shards / name).read_bytes()
        (shards / name).unlink()
        for again in (lambda: pack(str(source), shards, shard_samples=5), lambda: index_shards(str(shards))):
            with pytest.raises(UserError, match=r"train-000001\.(tar|index\.npz): missing|does not|lists"):
                again()
        (shards / name).write_bytes(content)


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


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_a_tar_compressed_or_not_and_size_limits_give_the_images_of_the_folder(tmp_path, compression):
    source = make_folder(tmp_path / "images", 30)
    path, shards = tmp_path / f"images.tar.{compression}", tmp_path / "shards"
    with tarfile.open(path, f"w:{compression}") as archive:
        archive.add(source, "images")
    index, _ = pack(str(path), shards, shard_bytes=2000)
    images = [read_sample(index, Span(s, 0, s.samples), n).image for s in index.shards for n in range(s.samples)]
    assert sorted(images) == sorted(path.read_bytes() for path in source.rglob("*.png"))
    assert all(load_members(index.root, s).sizes.sum() <= 2000 for s in index.shards)
    assert not list(shards.glob(".*"))  # the unpacked tar is gone
    content = path.read_bytes()
    with tarfile.open(path, f"r:{compression}") as archive:
        boundary = archive.getmembers()[20].offset
    for cut in (content[: len(content) // 2], content[:-20] if compression else content[:boundary]):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="not a whole tar"):
            pack(str(path), tmp_path / "refused")


def test_a_packed_archive_is_unpacked_again_only_when_it_or_the_options_changed(tmp_path, monkeypatch):
    path, shards, opened = tmp_path / "images.tar.gz", tmp_path / "shards", []
    original = packing.open_source
    monkeypatch.setattr(packing, "open_source", lambda *arguments: opened.append(arguments) or original(*arguments))

    def compress(count):
        source = make_folder(tmp_path / f"images{count}", count)
        (source / "class0" / "notes.txt").touch()
        with tarfile.open(path, "w:gz") as archive:
            archive.add(source, "images")

    compress(9)
    first = pack(str(path), shards)
    assert len(opened) == 1
    assert pack(str(path), shards) == first
    assert len(opened) == 1
    with pytest.raises(UserError, match="then --seed 0, now 1"):
        pack(str(path), shards, seed=1)
    os.utime(path, (0, 0))  # as a copy has another time
    assert pack(str(path), shards) == pack(str(path), shards) == first
    assert len(opened) == 3
    compress(10)
    with pytest.raises(UserError, match=r"then 9 images .* now 10 others"):
        pack(str(path), shards)


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
    sheet = tmp_path / "made" / "sheet"
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
    with pytest.raises(UserError, match=r"\(depthmup pack IMAGES '\S+/a folder'\)"):
        Index.load(tmp_path / "a folder")
    for name, of_index, of_inspect in (
        ("nowhere", "no such folder. Name a folder of .tar files", "no such folder. Make shards"),
        ("empty", "no .tar files in it. Make some", "no index.json and no .tar files in it. Make shards"),
        ("shards", None, "shards: .tar files, but no index.json. Make it with: depthmup index"),
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


def test_pack_and_index_start_without_torch_and_leave_a_whole_webdataset_to_others(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    program = (
        "import sys\n"
        "from depthmup.launch.cli import cli\n"
        "source, shards = sys.argv[1:]\n"
        "cli(['pack', source, shards], standalone_mode=False)\n"
        "cli(['index', shards], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch.utils.data, webdataset\n"
        "assert issubclass(webdataset.WebDataset, torch.utils.data.IterableDataset)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "images"), str(tmp_path / "shards")]
    subprocess.run(command, check=True, capture_output=True)
