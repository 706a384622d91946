"""Tars as people and their tools make them: read as what they mean, or refused in one line that says what to do."""

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthmup.data.errors import UserError
from depthmup.data.pack import pack
from depthmup.data.scan import index_shards
from depthmup.data.tar_samples import scan


def png(seed: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(content, "png")
    return content.getvalue()


def write(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(folder: str = "", count: int = 4) -> list[tuple[str, bytes]]:
    return [
        member for n in range(count) for member in ((f"{folder}{n}.png", png(n)), (f"{folder}{n}.cls", b"%d" % (n % 2)))
    ]


def names(path: Path) -> list[bytes]:
    return scan(str(path)).members.names.tolist()


@pytest.mark.parametrize("folder", ["", "cat/", "./", "../set/"])
def test_what_systems_leave_behind_is_no_sample_and_stands_between_none(tmp_path, folder):
    """macOS's tar writes ._0.png before each 0.png; in a folder its key would be that of the folder."""
    mixed = []
    for name, content in samples(folder):
        mixed += [(f"{folder}._{Path(name).name}", b"\0\5"), (name, content)]
    left = ["__MACOSX/._0.png", *(f"{folder}{name}" for name in (".DS_Store", "Thumbs.db", ".cache/0.png"))]
    path = write(tmp_path / "a.tar", *mixed, *((name, b"x") for name in left))
    assert names(path) == [f"{folder}{n}.png".encode() for n in range(4)]


def test_a_label_is_read_whatever_its_extensions_case_and_behind_a_byte_order_mark(tmp_path):
    first, second = [("0.PNG", png()), ("0.CLS", b"3")], [("1.png", png()), ("1.cls", b"\xef\xbb\xbf4\r\n")]
    assert scan(str(write(tmp_path / "a.tar", *first, *second))).members.labels.tolist() == [3, 4]


def hole() -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo("0.png")
    sizes = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "99"}
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", **sizes}
    return member, b"abc"


OTHERS: list[tuple[list[tuple[str | tarfile.TarInfo, bytes]], str]] = [
    ([*samples(), ("README.md", b"x")], r"README has no image .*, but README\.md\..*take it out: tar --delete -f"),
    ([("0.tif", b"image"), ("0.cls", b"0")], r"0 has no image .*, but 0\.tif and 0\.cls\. Write its image as"),
    ([("a.b.0.png", png()), ("a.b.0.cls", b"0")], r"a\.b\.0\.png: .*first dot.*names such as a_b_0\.png"),
    ([("0.png", png()), ("0.PNG", png())], r"0\.PNG is there twice: give each sample a name of its own"),
    ([("0.png", png()), ("0.cls", b"0"), ("0.cls", b"1")], r"0\.cls is there twice: give each"),
    ([*samples(), ("x.zip", b"PK")], r"holds other archives, such as x\.zip"),
    ([hole(), ("0.cls", b"0")], r"0\.png is stored with holes: make the tar anew .*without -S"),
]


@pytest.mark.parametrize(("members", "cure"), OTHERS)
def test_a_tar_that_holds_something_else_is_refused_with_the_cure(tmp_path, members, cure):
    write(tmp_path / "train-0.tar", *members)
    with pytest.raises(UserError, match=cure) as refused:
        index_shards(str(tmp_path), processes=1)
    assert "\n" not in str(refused.value)


def test_what_is_no_sample_is_taken_out_by_the_command_that_is_printed(tmp_path):
    write(tmp_path / "train-0.tar", *samples(), ("notes here.txt", b"text"))
    with pytest.raises(UserError, match="notes here has no image") as refused:
        index_shards(str(tmp_path), processes=1)
    assert os.system(str(refused.value).partition("take it out: ")[2]) == 0
    assert index_shards(str(tmp_path), processes=1).describe() == "4 samples in 1 shard"


def test_a_tar_with_holes_is_refused_as_a_source_of_pack_too(tmp_path):
    (tmp_path / "cat").mkdir()
    with open(tmp_path / "cat" / "0.png", "wb") as file:
        file.write(png())
        file.truncate(1 << 20)
    subprocess.run(["tar", "-S", "-cf", "holes.tar", "cat"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"cat/0\.png is stored with holes"):
        pack(str(tmp_path / "holes.tar"), tmp_path / "shards")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a pointer of Git LFS: .* git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page: .*download the file again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    ],
)
def test_what_was_fetched_instead_of_a_tar_is_named(tmp_path, content, words):
    (tmp_path / "train-0.tar").write_bytes(content)
    with pytest.raises(UserError, match=words):
        index_shards(str(tmp_path), processes=1)
    with pytest.raises(UserError, match=words):
        pack(str(tmp_path / "train-0.tar"), tmp_path / "shards")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([("0.cls", b"cat")], "0, has 'cat' there"),
        ([("0.cls", b'{"label": 3}')], "0, has '{\"label\": 3}' there"),
        ([("0.json", b"{}"), ("0.txt", b"cat")], r"0, has \.png and \.json and \.txt alone"),
    ],
)
def test_where_no_image_has_a_label_it_is_said_what_there_is_instead(tmp_path, labels, found):
    write(tmp_path / "train-0.tar", ("0.png", png()), *labels)
    with pytest.raises(UserError, match=f"no image has a label.*the first sample, {found}"):
        index_shards(str(tmp_path), processes=1)


def test_samples_without_a_label_are_counted_and_the_first_is_named_when_they_are_indexed(tmp_path):
    write(tmp_path / "train-0.tar", *samples())
    write(tmp_path / "train-1.tar", *samples("b"), ("x.png", png()), ("y.png", png()), ("y.cls", b"-1"))
    said: list[str] = []
    index_shards(str(tmp_path), processes=1, say=said.append)
    assert [re.sub(r" \(a whole.*?\)", "", line) for line in said] == [
        "2 of 10 samples without a label, the first x.png of train-1.tar: training counts them as bad "
        "(data.max_bad_fraction)"
    ]


def test_tars_are_found_whatever_the_case_of_their_extension_and_what_is_none_is_said(tmp_path):
    for name in ("train-0.TAR", "train-1.tar", "val/0.Tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, *samples())
    for name in ("train-2.tar.gz", "train-3.tar.part"):
        (tmp_path / name).write_bytes(b"part")
    said: list[str] = []
    index = index_shards(str(tmp_path), processes=1, say=said.append)
    assert {split: len(shards) for split, shards in index.splits.items()} == {"train": 2, "val": 1}
    assert said == [
        "left out: train-2.tar.gz, train-3.tar.part, no plain tars: unpack them to .tar files, or fetch the rest"
    ]


def test_a_pattern_may_have_stars_and_one_that_is_broken_is_refused(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write(tmp_path / name, *samples())
    index = index_shards(f"{tmp_path}/{{train,val}}-*.tar", tmp_path, processes=1)
    assert {split: len(shards) for split, shards in index.splits.items()} == {"train": 2, "val": 1}
    with pytest.raises(UserError, match=r"train-\{0,1\.tar: a brace is missing"):
        index_shards(f"{tmp_path}/train-{{0,1.tar", tmp_path, processes=1)
    with pytest.raises(UserError, match=r"none-\*\.tar: no such file"):
        index_shards(f"{tmp_path}/none-*.tar", tmp_path, processes=1)
