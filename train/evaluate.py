"""Loss and accuracy over a split, spread over the processes, each image counted once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from depthmup.data.bad import BadCount
from depthmup.data.batch import to_float
from depthmup.data.index import Index
from depthmup.data.loader import iterate_evaluation_batches
from depthmup.train.batches import open_data
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, gather_objects, sum_over_ranks
from depthmup.train.interrupt import Interrupted
from depthmup.train.networks import Networks


@torch.no_grad()
def evaluate(
    networks: Networks, split: str, config: RunConfig, index: Index, world: World, stop: Callable[[], bool]
) -> list[dict[str, float]]:
    """For each network its mean loss, top-1 and top-5 accuracy over `split`; every process gets the same.

    `stop` is asked after every batch, and says the same to every process. Raises Interrupted when it says so, and
    UserError past data.max_bad_fraction of bad samples.
    """
    sums = torch.zeros(len(networks.descriptions), 4, dtype=torch.float64, device=networks.device)
    model, data, device = config.model, config.data, networks.device
    batch_size = config.parallel.micro_batch_size or max(config.train.global_batch_size // world.size, 1)
    images_of_all = sum(span.samples for span in index.spans(split, data.minival))
    bad = BadCount(data.max_bad_fraction, images_of_all)
    batches = iterate_evaluation_batches(
        data, index, split, batch_size, model.image_size, model.in_channels, world.rank, world.size, device, bad
    )
    with networks.evaluating():
        for _ in range(-(-images_of_all // (world.size * batch_size))):  # the same everywhere: FSDP gathers in each
            batch = next(batches, None)
            if batch is None:
                networks.logits(torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=device))
            else:
                images, labels = to_float(batch, data, device, networks.channels_last)
                logits = networks.logits(images)  # (K, batch, classes)
                hits = logits.topk(min(5, model.num_classes), dim=2).indices == labels[:, None]  # (K, batch, 5)
                losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
                losses = losses.view(len(logits), -1).sum(1)
                sums[:, :3] += torch.stack([losses.double(), hits[..., 0].sum(1), hits.sum((1, 2))], dim=1)
                sums[:, 3] += len(labels)
            if stop():
                raise Interrupted(f"stopped in the evaluation of {split}, as asked")
    bad.merge_ranks(gather_objects(bad)).check()
    return [
        {
            f"{split}_loss": loss / images_seen,
            f"{split}_top1": top1 / images_seen,
            f"{split}_top5": top5 / images_seen,
            f"{split}_images": int(images_seen),
        }
        for loss, top1, top5, images_seen in sum_over_ranks(sums).tolist()
    ]


def read_held_out(config: RunConfig, count: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the minival split, or of val where nothing is held out, at most `count`, and their classes:
    (images, channels, image_size, image_size), (images,)."""
    split = "minival" if config.data.minival else "val"
    batches = iterate_evaluation_batches(
        config.data, open_data(config), split, count, image_size, config.model.in_channels
    )
    return to_float(next(iter(batches)), config.data, "cpu")


def evaluate_splits(
    networks: Networks, config: RunConfig, index: Index, world: World, stop: Callable[[], bool]
) -> list[dict[str, float]]:
    """As `evaluate`, of every split in `train.evaluate`; of an average of the weights too, as SPLIT_ema_..."""
    found: list[dict[str, float]] = [{} for _ in networks.descriptions]
    for split in config.train.evaluate:
        parts = evaluate(networks, split, config, index, world, stop)
        found = [mine | part for mine, part in zip(found, parts, strict=True)]
        if networks.average:
            with networks.average.swapped_in():
                parts = evaluate(networks, split, config, index, world, stop)
            renamed = [{k.replace(split, f"{split}_ema", 1): v for k, v in part.items()} for part in parts]
            found = [mine | part for mine, part in zip(found, renamed, strict=True)]
    return found
