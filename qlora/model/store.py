"""Where a model's four-bit weights go as they come in: each to the place that its layer was given, and into the cache.

What is in a layer is read off the model's structure: the largest `nn.ModuleList` is the layers, and the weights below
one of its members are that layer's group. Four-bit weights elsewhere are on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from qlora.config import MemoryConfig
from qlora.errors import HostMemoryError
from qlora.machine import GIB, free_bytes
from qlora.model.cache import Cache, CacheBuilder
from qlora.model.homes import Disk, LayerHome, OnFile, OnHost, key, layout_of, padded, spread
from qlora.model.nf4 import FourBit, FourBitWeight, parts_of, quantize
from qlora.model.transfer import host_buffer

Groups = Mapping[str, Mapping[str, torch.Size]]  # path of a layer, "" for all else -> its four-bit weights' shapes
ARENA = 4 * GIB  # layers on the host share buffers of at most this, as locking one page takes as long wherever it is


def groups_of(model: nn.Module, targets: Mapping[str, torch.Size]) -> dict[str, dict[str, torch.Size]]:
    """The four-bit weights of each layer, in the layers' order, and under "" those of no layer.

    targets  name -> shape of every weight that is to be four-bit
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    held = {name: sum(shape.numel() for key, shape in targets.items() if key.startswith(f"{name}.")) for name in lists}
    path = max(lists, key=lambda name: (held[name], -name.count(".")), default=None)
    groups: dict[str, dict[str, torch.Size]] = {}
    if path is not None:
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        for i in range(len(layers)):
            inside = {key: shape for key, shape in targets.items() if key.startswith(f"{path}.{i}.")}
            if inside:
                groups[f"{path}.{i}"] = inside
    placed = {key for inside in groups.values() for key in inside}
    others = {key: shape for key, shape in targets.items() if key not in placed}
    return groups | ({"": others} if others else {})


def tiers_of(groups: Groups, memory: MemoryConfig) -> dict[str, str]:
    """The tier of each group, as the recipe's `memory` section says."""
    layers = [group for group in groups if group]
    on_device = len(layers) if memory.layers_on_device is None else min(memory.layers_on_device, len(layers))
    others = len(layers) - on_device
    on_host = others if memory.layers_on_host is None else min(memory.layers_on_host, others)
    tiers = spread({"device": on_device, "host": on_host, "file": others - on_host})
    return dict(zip(layers, tiers, strict=True)) | dict.fromkeys(groups.keys() - set(layers), "device")


class Store:
    """Takes the weights of one model in."""

    def __init__(self, groups: Groups, tiers: Mapping[str, str], four_bit: FourBit, device: torch.device) -> None:
        """Raises HostMemoryError where the host cannot hold what is to be there."""
        self.four_bit, self.device = four_bit, device
        self.groups, self.tiers = groups, tiers
        self.layouts = {group: layout_of(weights, four_bit) for group, weights in groups.items()}
        self._group = {name: group for group, weights in groups.items() for name in weights}
        self._shape = {name: shape for weights in groups.values() for name, shape in weights.items()}
        self._held: dict[str, dict[str, torch.Tensor]] = {}  # parts that came from the cache, by weight
        self.cached = False  # whether all weights are here already
        self.builder: CacheBuilder | None = None
        self._homes = self._make_homes()

    @property
    def names(self) -> set[str]:
        """The weights that it takes."""
        return set(self._group)

    def shape(self, name: str) -> torch.Size:
        """Shape of a weight when dense."""
        return self._shape[name]

    def weight(self, name: str, dense: torch.Tensor | None) -> FourBitWeight:
        """One weight in four bits, in its place. dense: as it came; None where all are `cached`."""
        group = self._group[name]
        weight = FourBitWeight(self._shape[name], self.four_bit, self.device, name)
        home = self._homes.get(group)
        if dense is None:
            weight.held = self._held.pop(name, None)
        else:
            parts = quantize(dense.to(self.device), self.four_bit)
            if self.builder is not None:
                for part, value in parts.items():
                    self.builder.writer(group).write(key(name, part), value)
            if home is None:
                weight.held = parts
            elif isinstance(home, OnHost):
                home.replace(weight, parts)
        weight.home = home
        return weight

    def take(self, cache: Cache) -> None:
        """Bring every layer from the cache to its place, and look at every byte of it on the way. Raises CacheError."""
        largest = max(padded(layout.nbytes) for layout in self.layouts.values())
        passing: torch.Tensor | None = None
        held: dict[str, dict[str, torch.Tensor]] = {}
        for group, layout in self.layouts.items():
            home, reader = self._homes.get(group), cache.reader(group)
            if isinstance(home, OnHost):
                reader.read_into(home.buffer, self._disk.readers, verify=True)
                continue
            if passing is None:
                passing = host_buffer(largest, torch.device("cpu"))
            reader.read_into(passing, self._disk.readers, verify=True)
            if home is None:
                views = layout.views(passing)
                for name, shape in self.groups[group].items():
                    held[name] = {
                        part: views[key(name, part)].to(self.device, copy=True)
                        for part in parts_of(shape, self.four_bit)
                    }
        self.open_files(cache)
        self._held, self.cached = held, True

    def open_files(self, cache: Cache) -> None:
        """From here on layers on file are read from this cache, which is complete."""
        for group, home in self._homes.items():
            if isinstance(home, OnFile):
                home.reader = cache.reader(group)

    def _make_homes(self) -> dict[str, LayerHome]:
        self._disk = Disk(self.device)
        homes: dict[str, LayerHome] = {}
        on_host = [group for group, tier in self.tiers.items() if tier == "host"]
        self._check_host(on_host)
        arena: list[str] = []
        for group in [*on_host, None]:
            sizes = [padded(self.layouts[member].nbytes) for member in arena]
            if arena and (group is None or sum(sizes) + padded(self.layouts[group].nbytes) > ARENA):
                buffer = host_buffer(sum(sizes), self.device)
                for member, part in zip(arena, buffer.split(sizes), strict=True):
                    homes[member] = OnHost(self.layouts[member], part)
                arena = []
            if group is not None:
                arena.append(group)
        return homes | {
            group: OnFile(self.layouts[group], self._disk) for group, tier in self.tiers.items() if tier == "file"
        }

    def _check_host(self, on_host: Sequence[str]) -> None:
        needed, free = sum(padded(self.layouts[g].nbytes) for g in on_host), free_bytes(torch.device("cpu"))
        if needed <= free:
            return
        fit, total = 0, 0
        for group in on_host:
            total += padded(self.layouts[group].nbytes)
            fit += total < free * 0.9  # something is left for the rest of the process
        raise HostMemoryError(
            f"{len(on_host)} layers on the host need {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free\n"
            f"  fits:  memory.layers_on_host: {fit}   (the others are then read from the NF4 cache on disk)"
        )
