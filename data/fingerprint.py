"""Which images a data set's shards hold, told from its index. Nothing here imports torch or numpy."""

import hashlib
import json
from collections.abc import Collection

from depthmup.data import storage
from depthmup.data.errors import UserError

INDEX_NAME = "index.json"


def fingerprint_shards(root: str, splits: Collection[str]) -> str | None:
    """12 hexadecimal digits of the classes and of the shards of `splits`: their SHA-256 and counts, in their order.

    Neither where the shards lie nor how they are called enters. None where there is no index. Raises UserError for one
    that cannot be read.
    """
    path = storage.join(root, INDEX_NAME)
    try:
        raw = json.loads(storage.read_whole(path))
        content = [raw["classes"]]
        for split in sorted(splits):
            content.append([(shard["sha256"], shard["samples"]) for shard in raw["splits"].get(split, ())])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of shards ({type(error).__name__}: {error})") from None
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
