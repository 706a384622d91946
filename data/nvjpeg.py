"""JPEGs decoded on the GPU (data.backend nvjpeg): the same samples and random numbers, slightly other pixels.

Workers hand over the bytes of each file, the box of its crop and its random numbers. The process that trains decodes a
batch by nvJPEG, through torchcodec or torchvision, and crops, resizes and flips it on the device: one batch ahead, in a
thread and a CUDA stream of their own. What nvJPEG may read otherwise than PIL (other formats; JPEGs that are grey, CMYK
or RGB inside, cut, or large) workers decode by PIL, and hand over the pixels. On a CPU libjpeg-turbo takes nvJPEG's
place, and all else is the same: so it is tested.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from depthmup.data.augment import crop_flip, draw_box, prepare
from depthmup.data.batch import Batch, on_device
from depthmup.data.config import OTHER_DECODER
from depthmup.data.decode import center_box, decode_pil, from_array
from depthmup.data.errors import UserError
from depthmup.data.images import BadImage, check_pixels
from depthmup.data.index import NO_LABEL, Index, Span
from depthmup.data.reader import BadSample, read_sample
from depthmup.data.workers import PREFETCHED, Slots, Work, share_zeros, start, yield_in_order

FILE_BYTES = 1 << 20  # of the largest file that is handed over. Memory is taken for what there is, not for this.
NAME_BYTES = 4096  # more of a shard's and a member's names are cut
TOGETHER = 256  # images that are decoded and resized at once: photographs of a camera take 36 MB each
START, END, TAIL = b"\xff\xd8", b"\xff\xd9", 64  # of a JPEG. Its pixels never hold END, so a file that is cut lacks it.
EXIF = b"Exif\0\0"  # begins a JPEG's EXIF, by which torchcodec would turn a picture, while boxes are of its file's rows


@dataclass(frozen=True)
class Jpeg:
    """A file that the device decodes. box: (top, left, height, width) of what is wanted of its picture."""

    content: bytes
    shard: str
    key: str
    box: tuple[int, int, int, int]


def open_sample(index: Index, span: Span, number: int, channels: int) -> tuple[Jpeg | Tensor, int]:
    """Sample `number` of `span` and its label: a Jpeg, of its whole picture, or pixels (channels, height, width) where
    PIL is to decode it. Raises BadSample."""
    sample = read_sample(index, span, number)
    content, colorspace = sample.image, None
    try:
        if content[:2] == START and END in content[-TAIL:] and len(content) <= FILE_BYTES:
            with suppress(ValueError, KeyError):  # libjpeg-turbo is stricter than PIL, whose verdict counts
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        if colorspace != "YCbCr":
            return decode_pil(content, channels), sample.label
        check_pixels(height, width)
    except BadImage as error:
        raise BadSample(sample.shard, sample.key, str(error)) from None
    as_it_lies = content.replace(EXIF, bytes(len(EXIF)), 1)
    return Jpeg(as_it_lies, sample.shard, sample.key, (0, 0, height, width)), sample.label


def cut(image: Jpeg | Tensor, recipe: str, size: int, draws: np.ndarray) -> Jpeg | Tensor:
    """What data.augment's `recipe` takes of an image, but for shift and flip: a Jpeg's box, or (channels, size, size)
    pixels."""
    if not isinstance(image, Jpeg):
        return prepare(image, recipe, size, draws, "nvjpeg")
    height, width = image.box[2:]
    is_random = recipe == "resized_crop_flip"
    return replace(image, box=draw_box(height, width, draws[1:]) if is_random else center_box(height, width))


class JpegSlots(Slots):
    """Beside pixels, each batch has room for the files of its rows, which a worker lays one after the other."""

    def __init__(self, count: int, shape: tuple[int, int, int, int], num_workers: int) -> None:
        super().__init__(count, shape, num_workers)
        rows = shape[0]
        self.room = -(-rows // num_workers) * (FILE_BYTES + NAME_BYTES)  # of one worker
        self.files = share_zeros((count, num_workers * self.room), torch.uint8)
        self.places = share_zeros(
            (count, rows, 3), torch.int64
        )  # start, bytes of the file (0: there are pixels), of names
        self.boxes = share_zeros((count, rows, 4), torch.int64)
        self.draws = share_zeros((count, rows, 3), torch.float64)  # of shift and flip
        self.free = 0  # where the next file of this worker begins

    def begin(self, number: int, worker: int) -> None:
        super().begin(number, worker)
        self.free = worker * self.room

    def put(self, number: int, row: int, image: Jpeg | Tensor, draws: np.ndarray) -> None:
        slot = number % len(self.images)
        self.draws[slot, row, : len(draws[:3])] = torch.from_numpy(draws[:3])
        if not isinstance(image, Jpeg):
            self.images[slot, row], self.places[slot, row] = image, 0
            return
        names = f"{image.shard}\n{image.key}".encode()[:NAME_BYTES]
        record = image.content + names
        self.files[slot].numpy()[self.free : self.free + len(record)] = np.frombuffer(record, np.uint8)
        self.places[slot, row] = torch.tensor([self.free, len(image.content), len(names)])
        self.boxes[slot, row] = torch.tensor(image.box)
        self.free += len(record)

    def file(self, number: int, row: int) -> tuple[Tensor, str, str] | None:
        """A row's file, the name of its shard and its key; None where the row has pixels."""
        slot = number % len(self.images)
        first, length, of_names = self.places[slot, row].tolist()
        if not length:
            return None
        end = first + length
        names = self.files[slot, end : end + of_names].numpy().tobytes().decode(errors="replace")
        shard, _, key = names.partition("\n")
        return self.files[slot, first:end], shard, key


@cache
def find_decoder() -> Callable[[list[Tensor], str, torch.device], list[Tensor]]:
    """torchcodec's decoder of JPEGs, or torchvision's, which is deprecated since torchvision 0.29. Both are slow to
    import. Raises ImportError without either."""
    with suppress(ImportError, OSError):  # OSError: a torchcodec for another CUDA
        from torchcodec.decoders import decode_jpeg as decode  # since 0.16

        return lambda files, mode, device: list(decode(files, mode=mode, device=device))
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]  # it has none

    return lambda files, mode, device: list(decode_jpeg(files, ImageReadMode[mode], device))


def decode_by_nvjpeg(files: Sequence[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    """Raises RuntimeError where one of them cannot be decoded, without saying which; ImportError without a decoder."""
    return find_decoder()(list(files), "GRAY" if channels == 1 else "RGB", device)


def decode_files(files: Sequence[Tensor], channels: int, device: torch.device) -> list[Tensor | None]:
    """Each file's picture (channels, height, width) uint8 on `device`; None for one that cannot be decoded there."""
    if not files:
        return []
    try:
        if device.type == "cuda":
            return [*decode_by_nvjpeg(files, channels, device)]
        color = "GRAY" if channels == 1 else "RGB"
        return [from_array(simplejpeg.decode_jpeg(file.numpy(), color)) for file in files]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        if len(files) == 1:
            return [None]
        half = len(files) // 2
        return decode_files(files[:half], channels, device) + decode_files(files[half:], channels, device)


def resize(crops: Sequence[Tensor], size: int) -> Tensor:
    """(channels, height, width) uint8 each -> (images, channels, size, size) uint8, bicubic with antialiasing."""
    resized = [
        crop[None].float()
        if crop.shape[1:] == (size, size)
        else F.interpolate(crop[None].float(), (size, size), mode="bicubic", antialias=True)
        for crop in crops
    ]
    return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)


class Decoder:
    """Makes batches of what workers have put into `slots`. augment: of data.augment, None in an evaluation."""

    def __init__(self, slots: JpegSlots, augment: str | None, device: torch.device) -> None:
        self.slots, self.augment, self.device = slots, augment, device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def decode(self, number: int, bad: tuple[BadSample, ...]) -> tuple[Batch, torch.cuda.Event | None]:
        """Batch `number`, and what the stream that uses it has to wait for.

        A file that turns out bad only here is black in training, and left out of an evaluation.
        """
        slots, device = self.slots, self.device
        slots.check_filled(number)
        slot, labels = number % len(slots.images), slots.of(number)[1]
        rows = (labels != NO_LABEL).nonzero()[:, 0].numpy()
        late: dict[int, BadSample] = {}
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            crops, missed = [slots.images[slot, :0].to(device)], 0
            for first in range(0, len(rows), TOGETHER):
                cropped, missed_here = self.crop(number, rows[first : first + TOGETHER].tolist(), late)
                crops.append(cropped)
                missed += missed_here
            images = torch.cat(crops)
            if self.augment is None and late:
                rows = np.setdiff1d(rows, list(late))
            draws = on_device(slots.draws[slot].numpy()[rows], device)
            if self.augment == "crop_flip":
                images = crop_flip(images, draws)
            elif self.augment == "resized_crop_flip":
                images = torch.where(draws[:, :1, None, None] < 0.5, images.flip(3), images)
            batch = Batch(images, on_device(labels.numpy()[rows], device), (*bad, *late.values()), missed)
            return batch, self.stream.record_event() if self.stream else None

    def crop(self, number: int, rows: list[int], late: dict[int, BadSample]) -> tuple[Tensor, int]:
        """Crops of `rows`, and of how many nvJPEG did not decode the file. Notes bad ones in `late`."""
        if self.stream:  # nvJPEG writes by a stream of its own, which does not wait for what reads the last pictures
            self.stream.synchronize()
        slots = self.slots
        slot, (channels, size) = number % len(slots.images), slots.images.shape[2:4]
        files = {row: file for row in rows if (file := slots.file(number, row))}
        decoded = decode_files([content for content, _, _ in files.values()], channels, self.device)
        pictures = dict(zip(files, decoded, strict=True))
        crops = []
        for row in rows:
            if row not in files:
                crops.append(slots.images[slot, row].to(self.device))
                continue
            picture, (content, shard, key) = pictures[row], files[row]
            if picture is None:
                try:
                    picture = decode_pil(content.numpy().tobytes(), channels).to(self.device)
                except BadImage as error:
                    late[row] = BadSample(shard, key, str(error))
                    if self.augment is not None:
                        crops.append(torch.zeros(channels, size, size, dtype=torch.uint8, device=self.device))
                    continue
            top, left, height, width = slots.boxes[slot, row].tolist()
            crops.append(picture[:, top : top + height, left : left + width])
        images = resize(crops, size) if crops else slots.images[slot, :0].to(self.device)
        return images, len(rows) - sum(picture is not None for picture in decoded)


def decode_batches(
    work: Work, shape: tuple[int, int, int, int], num_workers: int, device: torch.device, augment: str | None
) -> Iterator[Batch]:
    """As data.workers.make_batches, of files. Batch n is decoded while n - 1 is in use: there is one more slot."""
    slots = JpegSlots(PREFETCHED + 2 if num_workers else 2, shape, max(num_workers, 1))
    parts = start(work, slots, num_workers)
    decoder = Decoder(slots, augment, device)

    def take(number: int, decoding: Future[tuple[Batch, torch.cuda.Event | None]]) -> Batch:
        batch, decoded = decoding.result()
        slots.release(number)
        return batch.after(decoded) if decoded else batch

    with ThreadPoolExecutor(1, "decode") as thread:
        decoding = None
        for number, bad in enumerate(yield_in_order(parts, max(num_workers, 1))):
            last, decoding = decoding, thread.submit(decoder.decode, number, bad)
            if last:
                yield take(number - 1, last)
        if decoding:
            yield take(number, decoding)


def check_decoder(device: torch.device) -> None:
    """Raises UserError where a run's device, or the libraries that are installed, do not decode JPEGs."""
    if device.type != "cuda":
        raise UserError(f"data.backend nvjpeg decodes on a GPU, and this run is on the CPU: {OTHER_DECODER}")
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "jpeg")
    try:
        decode_by_nvjpeg([torch.frombuffer(content.getbuffer(), dtype=torch.uint8)], 3, device)
    except (ImportError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"data.backend nvjpeg needs a torchcodec or torchvision with nvJPEG, for the CUDA of torch "
            f"{torch.__version__}: pip install 'depthmup[nvjpeg]', or {OTHER_DECODER} ({why})"
        ) from None
