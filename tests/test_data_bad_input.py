"""Bad shards and images: counted by shard and reason, or refused with one clear line; nothing hangs or is skipped."""

import contextlib
import io
import os
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from depthmup.data.decode import decode
from depthmup.data.errors import UserError
from depthmup.data.images import BadImage
from depthmup.data.index import Index, load_members
from depthmup.data.inspect import inspect_split
from depthmup.data.loader import TrainingLoader, TrainingStream, iterate_evaluation_batches
from depthmup.data.order import State
from depthmup.data.scan import index_shards
from depthmup.data.tar_samples import scan
from image_sets import config, write_tar


def encode(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(width=16, height=16) -> Image.Image:
    ramp = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)
    return Image.fromarray(np.stack([ramp, ramp.T.reshape(height, width), 255 - ramp], axis=2))


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


JPEG = encode(picture(), "jpeg")
BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], b"0", "not a readable image"),
    "garbage.jpg": (b"\xff\xd8garbage" * 9, b"0", "not a readable image"),
    "empty.jpg": (b"", b"0", "empty file"),
    "bomb.png": (huge_png(20_000), b"0", "more than 89478485 pixels"),
    "large.png": (huge_png(10_000), b"0", "more than 89478485 pixels"),  # PIL itself only warns up to twice its limit
    "unlabelled.jpg": (JPEG, None, "no whole number in a member .cls"),
    "worded.jpg": (JPEG, b"dog", "no whole number in a member .cls"),
    "negative.jpg": (JPEG, b"-1", "no whole number in a member .cls"),
    "high.jpg": (JPEG, b"7", "label 7, but there are 2 classes"),
}


@pytest.fixture
def rotten(tmp_path) -> Index:
    samples = [(f"good{number}.jpg", JPEG, b"%d" % (number % 2)) for number in range(39)]
    for place, (name, (content, label, _)) in enumerate(BAD.items()):
        samples.insert(place * 5, (name, content, label))
    write_tar(tmp_path / "train-0.tar", samples)
    return index_shards(str(tmp_path), classes=["a", "b"], processes=1)


@pytest.mark.parametrize("in_memory", [False, True])
def test_bad_samples_are_counted_by_shard_and_reason_and_the_epoch_keeps_its_length(rotten, in_memory):
    options = config(rotten, minival=0, num_streams=4, window=12, max_bad_fraction=0.2, in_memory=in_memory)
    loader = TrainingLoader(TrainingStream(options, rotten, State(0), 8, 16, 3))
    batches = list(islice(loader, 6))  # one epoch of 48
    assert all(batch.images.shape == (8, 3, 16, 16) for batch in batches)
    assert {bad.key: bad.reason.partition(" (")[0] for batch in batches for bad in batch.bad} == {
        name: reason for name, (_, _, reason) in BAD.items()
    }
    assert loader.bad.total() == len(BAD)
    assert "train-0.tar: 1 x empty file" in loader.bad.lines()
    good = list(iterate_evaluation_batches(options, rotten, "train", 7, 16, 3))
    assert sum(len(batch.labels) for batch in good) == 39


def test_stand_ins_are_the_same_streamed_and_in_memory(rotten):
    def images(in_memory):
        options = config(rotten, minival=0, num_streams=4, window=5, max_bad_fraction=1.0, in_memory=in_memory)
        stream = TrainingStream(options, rotten, State(0, position=8), 8, 16, 3)
        return [(b.images, b.labels, [str(bad) for bad in b.bad]) for b in islice(TrainingLoader(stream), 9)]

    for (a, labels, bad), (b, other_labels, other_bad) in zip(images(False), images(True), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, other_labels)
        assert bad == other_bad


def test_a_window_of_bad_samples_alone_is_served_by_the_next_and_ends_the_run_past_the_allowed_fraction(tmp_path):
    """Of 48 samples the first 16 are bad: at least 3 windows of 4. Streamed, by two ranks or in memory: the same."""
    write_tar(
        tmp_path / "train-0.tar",
        [(f"{n}.jpg", encode(Image.new("RGB", (16, 16), (4 * n, 0, 0)), "jpeg"), b"0" if n >= 16 else None)
         for n in range(48)],
    )  # fmt: skip
    index = index_shards(str(tmp_path), processes=1)

    def batches(max_bad_fraction, rank=0, world_size=1, **options):
        settings = config(index, minival=0, num_streams=4, window=4, max_bad_fraction=max_bad_fraction, **options)
        loader = TrainingLoader(TrainingStream(settings, index, State(0), 8, 16, 3, rank, world_size))
        return torch.stack([batch.images for batch in islice(loader, 6)]), loader.bad

    streamed, count = batches(0.34)
    assert count.total() == 16
    assert torch.equal(streamed, batches(0.34, in_memory=True)[0])
    ranks = [batches(0.34, rank, 2) for rank in range(2)]
    assert torch.equal(streamed.unflatten(1, (4, 2))[:, ::2].flatten(1, 2), ranks[0][0])
    assert max(count.total() for _, count in ranks) > 0.34 * 24  # of its own share one has too many
    together = ranks[0][1].merge_ranks(count for _, count in ranks)
    together.check()
    assert together.metrics() == {"bad_samples": 16, "bad_samples/train-0.tar/no whole number in a member .cls": 16}
    for in_memory in (False, True):
        with pytest.raises(UserError, match=r"\d+ of 48 samples are bad, more than data\.max_bad_fraction 0\.3"):
            batches(0.3, in_memory=in_memory)
    write_tar(tmp_path / "train-0.tar", [(f"{n}.jpg", JPEG, None) for n in range(48)])
    (tmp_path / "index.json").unlink()
    index = index_shards(str(tmp_path), classes=["a"], processes=1)
    with pytest.raises(UserError, match=r"48 of 48 samples are bad"):
        batches(1.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_past_the_allowed_fraction_the_run_ends_with_the_counts(rotten, num_workers):
    options = config(rotten, minival=0, num_streams=4, window=12, max_bad_fraction=0.05, num_workers=num_workers)
    with pytest.raises(UserError, match=r"max_bad_fraction 0\.05.*train-0\.tar: 1 x"):
        list(islice(TrainingLoader(TrainingStream(options, rotten, State(0), 8, 16, 3)), 6))
    with pytest.raises(UserError, match="max_bad_fraction"):
        list(iterate_evaluation_batches(options, rotten, "train", 7, 16, 3))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_vanishes_under_a_run_ends_it_in_one_line(rotten, num_workers):
    options = config(rotten, minival=0, num_streams=4, window=12, max_bad_fraction=1.0, num_workers=num_workers)
    (Path(rotten.root) / "train-0.tar").unlink()
    with pytest.raises(UserError, match=r"train-0\.tar: No such file or directory$") as refused:
        list(islice(TrainingLoader(TrainingStream(options, rotten, State(0), 8, 16, 3)), 6))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"^\S+train-0\.tar: No such file or directory$"):
        list(iterate_evaluation_batches(options, rotten, "train", 7, 16, 3))


def test_a_shard_that_changed_under_its_index_is_found(rotten):
    path = Path(rotten.root) / "train-0.tar"
    content = bytearray(path.read_bytes())
    start = int(load_members(rotten.root, rotten.shards[0]).offsets[1])
    content[start - 512 : start - 400] = os.urandom(112)  # the header of good0
    longer = tarfile.TarInfo(load_members(rotten.root, rotten.shards[0]).names[2].decode())
    longer.size = len(JPEG) + 1
    start = int(load_members(rotten.root, rotten.shards[0]).offsets[2])
    content[start - 512 : start] = longer.tobuf()
    path.write_bytes(content)
    options = config(rotten, minival=0, num_streams=4, window=12, max_bad_fraction=1.0)
    loader = TrainingLoader(TrainingStream(options, rotten, State(0), 8, 16, 3))
    list(islice(loader, 6))
    assert loader.bad.counts[("train-0.tar", "the index disagrees with the shard")] == 2
    path.write_bytes(content[:-512])
    with pytest.raises(UserError, match=r"train-0\.tar: \d+ bytes, but index\.json says"):
        rotten.check_files()
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        rotten.check_files()


def test_a_tar_that_is_cut_damaged_or_joined_to_another_is_refused_and_loses_no_sample_silently(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{n}.jpg", JPEG, b"0") for n in range(20)])
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
        end = archive.offset
    assert len(scan(str(path)).members.names) == 20
    path.write_bytes(content[: end + 512])  # one block of zeros is an end
    assert len(scan(str(path)).members.names) == 20
    for stop in (headers[7], headers[8], headers[8] + 100, headers[8] + 700, end, end + 511):
        path.write_bytes(content[:stop])
        with pytest.raises(
            UserError, match=r"a\.tar: not a whole tar of samples \((cut off: no end mark at byte \d+|une)"
        ):
            scan(str(path))
    for number in (0, 7, 8, 39):
        for garbage in (b"\0" * 512, b"\xaa" * 512):
            place = headers[number]
            path.write_bytes(content[:place] + garbage + content[place + 512 :])
            with pytest.raises(UserError, match=rf"(no member's header at byte {place}, but more|invalid|empty)"):
                scan(str(path))
    path.write_bytes(content + content)
    with pytest.raises(UserError, match="no member's header at byte"):
        scan(str(path))
    with tarfile.open(path, "w") as archive:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.jpg"
            archive.addfile(link)
    with pytest.raises(UserError, match=r"1\.jpg is no file but a link"):
        scan(str(path))


def test_names_that_begin_with_underscores_are_samples_unless_webdataset_skips_them(tmp_path):
    write_tar(tmp_path / "a.tar", [("__misc/0.jpg", JPEG, b"0"), ("__info__/1.jpg", JPEG, b"0")])
    assert scan(str(tmp_path / "a.tar")).members.names.tolist() == [b"__misc/0.jpg"]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_language_encoding_and_length_are_read_and_another_name_is_still_noticed(tmp_path, kind):
    names = [
        "café/1.jpg",
        "caf\udce9/2.jpg",
        "猫/3.jpg",
        f"{'é' * 120}/4.jpg",
        f"a{'é' * 60}.jpg",
        f"{'x' * 180}/6.jpg",
    ]
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=kind, encoding="utf-8", errors="surrogateescape") as archive:
        for name in names:
            for member, content in ((name, JPEG), (name.replace(".jpg", ".cls"), b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    index = index_shards(str(tmp_path), processes=1)
    found = inspect_split(index, "train", processes=1)
    assert len(found.sizes) == len(names)
    assert not found.bad
    content = path.read_bytes()
    header = tarfile.TarInfo("dog/1.jpg")
    header.size = len(JPEG)
    start = int(load_members(index.root, index.shards[0]).offsets[0])
    path.write_bytes(content[: start - 512] + header.tobuf() + content[start:])
    assert [str(bad) for bad in inspect_split(index, "train", processes=1).bad] == [
        "train-0.tar: café/1.jpg: the index disagrees with the shard"
    ]


def test_unusual_images_are_read_as_pil_reads_them():
    image = picture()
    sixteen = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    rotated = image.getexif()
    rotated[0x0112] = 6
    for content in (
        encode(image.convert("CMYK"), "jpeg"),
        encode(image.convert("L"), "jpeg"),
        encode(image.convert("P"), "png"),
        encode(image.convert("RGBA"), "png"),
        encode(image, "webp"),
        encode(image, "jpeg", exif=rotated.tobytes()),
        encode(sixteen, "png"),
    ):
        for channels in (1, 3):
            fast, pil = decode(content, channels, "fast"), decode(content, channels, "pil")
            assert fast.shape == pil.shape == (channels, 16, 16)
            assert (fast.float() - pil.float()).abs().mean() < 1
    grey = decode(encode(sixteen, "png"), 1, "pil")[0].numpy()
    assert np.array_equal(grey, np.asarray(image.convert("L")))


def test_an_unknown_chroma_subsampling_is_left_to_pil():
    """simplejpeg raises KeyError for it, no ValueError."""
    content = bytearray(encode(picture(32, 32), "jpeg", subsampling="4:4:4"))
    content[content.index(b"\xff\xc0") + 11] = 0x14  # four rows of luma for one of chroma
    assert torch.equal(decode(bytes(content), 3, "fast"), decode(bytes(content), 3, "pil"))


@pytest.mark.parametrize("augment", ["none", "resized_crop_flip"])
def test_images_of_a_batch_do_not_share_the_memory_they_were_decoded_into(tmp_path, augment):
    pictures = [Image.new("RGB", (16, 16), (50 * number, 0, 0)) for number in range(4)]
    write_tar(tmp_path / "train-0.tar", [(f"{n}.jpg", encode(p, "jpeg"), b"0") for n, p in enumerate(pictures)])
    index = index_shards(str(tmp_path), processes=1)
    options = config(index, minival=0, num_streams=2, augment=augment)
    trained = next(iter(TrainingLoader(TrainingStream(options, index, State(0), 4, 16, 3)))).images
    [evaluated] = iterate_evaluation_batches(options, index, "train", 4, 16, 3)
    for images in (trained, evaluated.images):
        assert sorted(round(image[0].float().mean().item(), -1) for image in images) == [0, 50, 100, 150]


def test_fast_and_reference_backend_give_the_same_pictures():
    """Mean absolute difference below 0.1 grey levels over decode, crop and resize of a smooth picture."""
    from depthmup.data.decode import crop_resize

    content = encode(picture(200, 150), "jpeg", quality=90)
    fast, pil = (
        crop_resize(decode(content, 3, backend), (20, 10, 110, 150), 64, backend).float() for backend in ("fast", "pil")
    )
    assert (fast - pil).abs().mean() < 0.1


@given(st.data())
@settings(max_examples=50, deadline=None)  # minutes of it: tests/test_data_fuzz.py
def test_fuzzed_images_decode_or_are_called_bad(data):
    content = bytearray(data.draw(st.sampled_from([JPEG, encode(picture(), "png"), encode(picture(), "webp")])))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=9)
    ):
        content[place] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    for backend in ("fast", "pil"):
        with contextlib.suppress(BadImage):
            assert decode(bytes(content), 3, backend).shape[0] == 3


@given(st.data())
@settings(max_examples=50, deadline=None)  # minutes of it: tests/test_data_fuzz.py
def test_fuzzed_tars_are_scanned_whole_or_refused(tmp_path_factory, data):
    """One byte changed, which no header's checksum survives, and a cut: refused, or every sample is there."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    write_tar(path, [(f"{n}.jpg", JPEG[:300], b"0") for n in range(3)])
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(UserError):
        members = scan(str(path)).members
        assert len(members.names) == len(members.offsets) == 3
