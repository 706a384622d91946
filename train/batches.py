"""The batches of one seed as a step takes them: floats on the device, in order, mixed, with their numbers drawn."""

from collections.abc import Iterator

import torch
from torch import Tensor

from depthmup.data.batch import to_float
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.mixing import mix, mixes, order_pairs
from depthmup.data.nvjpeg import check_decoder
from depthmup.data.order import State, list_places
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World
from depthmup.train.networks import Networks
from depthmup.train.stochastic_depth import draw_uniform


def open_data(config: RunConfig) -> Index:
    """The data set's index. Raises UserError when it does not fit the model or a shard is missing."""
    if config.data.rand_augment or mixes(config.data) or config.data.backend == "nvjpeg":
        # It must run before timm, which data.distort and data.mixing import, and before torchvision.
        import depthmup.models.torchvision_ops  # noqa: F401
    index = Index.load(config.data.root, config.data.trust)
    index.check_files()
    for split in ("train", *config.train.evaluate):  # an empty one is to be known before training, not after
        index.spans(split, config.data.minival)
    index.check_classes(config.model.num_classes)
    return index


class Batches:
    """The steps from `state` on, which is where the run stands after `first_step` steps.

    A process takes its images of a global batch in such an order that what is mixed, normalised and dropped together
    does not depend on the number of processes and micro-batches.
    """

    def __init__(
        self, config: RunConfig, index: Index, state: State, first_step: int, world: World, networks: Networks
    ) -> None:
        """Raises UserError where the data cannot be spread over so many processes, or decoded on the device."""
        if config.data.backend == "nvjpeg":
            check_decoder(networks.device)
        self.config, self.seed, self.first_step, self.networks = config, state.seed, first_step, networks
        batch = config.data.num_streams, config.train.global_batch_size
        self.places = list_places(world.rank, world.size, *batch)
        self.paired: Tensor | None = None
        self.grouped: Tensor | None = None
        if mixes(config.data):
            order = order_pairs(self.places, *batch)
            self.places, self.paired = self.places[order], torch.from_numpy(order).to(networks.device)
        if networks.grouping and networks.grouping.num_groups > 1:
            order = networks.grouping.order(self.places)
            self.places, self.grouped = self.places[order], torch.from_numpy(order).to(networks.device)
        model, size = config.model, config.train.global_batch_size
        stream = TrainingStream(
            config.data, index, state, size, model.image_size, model.in_channels, world.rank, world.size
        )
        self.loader = TrainingLoader(stream, networks.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Images, targets and uniform numbers of each step, without the leading axis of train.networks."""
        config, networks = self.config, self.networks
        for step, batch in enumerate(self.loader, start=self.first_step):
            images, targets = to_float(batch, config.data, networks.device, networks.channels_last)
            if self.paired is not None:
                images, targets = images[self.paired], targets[self.paired]
                images, targets = mix(images, targets, config.data, config.model.num_classes, self.seed, step)
            if self.grouped is not None:
                images, targets = images[self.grouped], targets[self.grouped]
            uniform = None
            if branches := networks.num_drop_branches:
                uniform = draw_uniform(self.seed, step, branches, config.train.global_batch_size, self.places)
                uniform = uniform.to(networks.device)
            yield images, targets, uniform


def stack_seeds(batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """One batch of each seed with a leading axis; a view where there is one seed."""
    if len(batches) == 1:
        images, targets, uniform = batches[0]
        return images[None], targets[None], None if uniform is None else uniform[None]
    images, targets = (torch.stack([batch[part] for batch in batches]) for part in (0, 1))  # type: ignore[misc]
    drawn = [uniform for _, _, uniform in batches if uniform is not None]
    return images, targets, torch.stack(drawn) if drawn else None
