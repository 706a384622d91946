"""Families whose networks others wrote: their roles are found by looking at the base."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from depthmup.models.discovery.find import Discovery, find_roles
from depthmup.models.discovery.growth import build_network, refuse_other_shapes
from depthmup.models.errors import ModelError
from depthmup.models.family import Family, Roles


def make_found_family(
    name: str, kind: type[Any], build: Callable[[Any], nn.Module], check: Callable[[Any], None] | None = None
) -> Family:
    """The family `name` of the configurations of class `kind`. `build` gives the network at a configuration's size;
    `check` raises ModelError for a base of which nothing should be found."""

    @lru_cache(maxsize=64)
    def find(text: str) -> Discovery:
        """What is found of the networks whose base is the configuration of `text`, in JSON."""
        base = kind(**json.loads(text))
        if check:
            check(base)

        def build_at(width: int, depth: int) -> nn.Module:
            return build(replace(base, width=width, depth=depth))

        inputs = torch.zeros(2, base.in_channels, base.image_size, base.image_size)
        found = find_roles(build_at, inputs, base.base_width, base.base_depth)
        if found.roles.blocks is None:
            raise ModelError(
                f"{type(build(base)).__name__} adds branches outside of all modules, so that no block is known: "
                "put the sum of stream and branch into a module of each block"
            )
        return found

    def roles(config: Any) -> Roles:
        """Of the base; the same at every size. Raises ModelError for a size that has other shapes."""
        base = replace(config, width=config.base_width, depth=config.base_depth)
        found = find(json.dumps(asdict(base), sort_keys=True))
        if config.width != config.base_width:
            network = build_network(lambda width, depth: build(config), config.width, config.depth, "meta")
            refuse_other_shapes(found.growth, network, config.width / config.base_width)
        return found.roles

    return Family(name=name, build=build, roles=roles, finds_roles=True)
