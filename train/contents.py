"""A checkpoint's table of contents: contents.json, and the pickle `.metadata` of older checkpoints.

torch.distributed.checkpoint writes its table as a pickle, which can run code and which depends on Python's version:
3.11.0 to 3.11.3 pickle the member of an enum as a call of getattr. JSON has neither fault.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata

# Where a tensor lies in which file; torch has no public class for it, and its reader takes no other.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

CONTENTS = "contents.json"


def describe(metadata: Metadata) -> dict[str, Any]:
    """Qualified name -> type, size, place in the state and chunks of the tensor, as plain data.

    Raises TypeError for what is no tensor."""
    found: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise TypeError(f"{name} is no tensor, and has no place in a checkpoint")
        places = [metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in stored.chunks]
        found[name] = {
            "dtype": str(stored.properties.dtype).removeprefix("torch."),
            "size": list(stored.size),
            "keys": list(metadata.planner_data[name]),
            "chunks": [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
                for chunk, place in zip(stored.chunks, places, strict=True)
            ],
        }
    return found


def restore(contents: dict[str, Any]) -> Metadata:
    """The inverse of `describe`. Raises KeyError, TypeError or ValueError where it is none."""
    tensors, places, keys = {}, {}, {}
    for name, tensor in contents.items():
        if not isinstance(dtype := getattr(torch, tensor["dtype"]), torch.dtype):
            raise ValueError(f"{name}: {tensor['dtype']!r} is no type of a tensor")
        chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in tensor["chunks"]]
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["size"]), chunks)
        for number, (chunk, place) in enumerate(zip(chunks, tensor["chunks"], strict=True)):
            index = MetadataIndex(name, chunk.offsets, number)
            places[index] = _StorageInfo(place["file"], place["start"], place["bytes"])
        keys[name] = tuple(tensor["keys"])
    return Metadata(state_dict_metadata=dict(tensors), planner_data=keys, storage_data=places)


class Writer(dcp.FileSystemWriter):
    """torch's writer, with contents.json for its pickle."""

    def finish(self, metadata: Metadata, results: Any) -> None:
        metadata.storage_data = {item.index: item.storage_data for items in results for item in items}
        (Path(self.path) / CONTENTS).write_text(json.dumps(describe(metadata)))


class Reader(dcp.FileSystemReader):
    """torch's reader of either table of contents; neither can run code. `fault`: why it could not be read, which torch
    2.9 drops, to end with an assertion that names nothing."""

    fault: Exception | None = None

    def read_metadata(self, *arguments: Any, **settings: Any) -> Metadata:
        try:
            return self.read_contents()
        except Exception as error:
            self.fault = error
            raise

    def read_contents(self) -> Metadata:
        contents, pickled = Path(self.path) / CONTENTS, Path(self.path) / ".metadata"
        if contents.exists():
            metadata = restore(json.loads(contents.read_text()))
        else:
            with open(pickled, "rb") as file:
                metadata = PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# ---------------------------------------------------------------- the pickle of older checkpoints

MEMORY_FORMATS = torch_metadata._MEM_FORMAT_ENCODING


def memory_format(owner: Any, name: str) -> Any:
    """What a pickle of Python 3.11.0 to 3.11.3 calls getattr for, and nothing else."""
    if owner is not MEMORY_FORMATS:
        raise pickle.UnpicklingError(f"an attribute {name!r} of {owner!r} has no place in a checkpoint")
    return getattr(MEMORY_FORMATS, name)


# All that the pickle may name: nothing that runs. BytesStorageMetadata is not among them: it stands for an object that
# is no tensor, which torch would unpickle.
ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float64"), ("torch", "int64"),
    ("torch", "float16"), ("torch", "bool"), ("torch", "uint8"), ("torch", "int32"), ("torch", "strided"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
REPLACED: dict[tuple[str, str], Callable[..., Any]] = {("builtins", "getattr"): memory_format}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in REPLACED:
            return REPLACED[module, name]
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)
