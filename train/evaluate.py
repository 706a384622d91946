"""Loss and accuracy over a split, spread over the processes, each image counted once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from depthmup.data.bad import BadCount
from depthmup.data.batch import to_float
from depthmup.data.index import Index
from depthmup.data.loader import evaluation_batches
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, gather_objects, sum_over_ranks
from depthmup.train.engine import Engine, average_buffers
from depthmup.train.interrupt import Interrupted
from depthmup.train.step import autocast


@torch.no_grad()
def evaluate(
    engine: Engine,
    split: str,
    config: RunConfig,
    index: Index,
    world: World,
    device: torch.device,
    dtype: torch.dtype | None,
    channels_last: bool,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy over `split`; every process calls it and gets the same.

    `stop` is asked after every batch, and says the same to every process. Raises Interrupted when it says so, and
    UserError past data.max_bad_fraction of bad samples.
    """
    average_buffers(engine.network)
    engine.module.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    model, data = config.model, config.data
    batch_size = config.parallel.micro_batch_size or max(config.train.global_batch_size // world.size, 1)
    images_of_all = sum(span.samples for span in index.spans(split, data.minival))
    bad = BadCount(data.max_bad_fraction, images_of_all)
    batches = evaluation_batches(
        data, index, split, batch_size, model.image_size, model.in_channels, world.rank, world.size, device, bad
    )
    try:
        for _ in range(-(-images_of_all // (world.size * batch_size))):  # the same everywhere: FSDP gathers in each
            batch = next(batches, None)
            if batch is None:
                engine.module(torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=device))
            else:
                images, labels = to_float(batch, data, device, channels_last)
                with autocast(device, dtype):
                    logits = engine.module(images).float()  # (batch, classes)
                hits = logits.topk(min(5, model.num_classes), dim=1).indices == labels[:, None]  # (batch, 5)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums[:3] += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum()])
                sums[3] += len(labels)
            if stop():
                raise Interrupted(f"stopped in the evaluation of {split}, as asked")
    finally:
        engine.reshard()
        engine.module.train()
    bad.over_ranks(gather_objects(bad)).check()
    loss_sum, top1, top5, images_seen = sum_over_ranks(sums).tolist()
    return {
        f"{split}_loss": loss_sum / images_seen,
        f"{split}_top1": top1 / images_seen,
        f"{split}_top5": top5 / images_seen,
        f"{split}_images": int(images_seen),
    }
