"""FairDropout: example-tied dropout in one place, equally many memorization channels for every example."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from memloc import dropout
from memloc.dropout import _STEP, ExampleTiedDropout, Slot, _mixed, _shifted
from memloc.evaluation import classes, predict
from memloc.groups import GroupedData, GroupedSplit, group_accuracies
from memloc.randomness import derive, generator

__all__ = ["KINDS", "TREATMENTS", "Ablation", "FairDropout", "ablate", "by_group", "insert", "masked", "treatments"]

KINDS = (*dropout.KINDS, "fair")
"""The dropouts that a recipe can have: those of :func:`memloc.dropout.insert`, and :class:`FairDropout`."""

TREATMENTS = ("own", "another's", "none", "own, fewer shared", "all", "all but own", "all but another's")
"""What :func:`ablate` leaves on; see :func:`treatments`."""


class FairDropout(ExampleTiedDropout):
    """Lets every example use the generalization channels, and a fixed number of memorization channels of its own.

    As :class:`memloc.dropout.ExampleTiedDropout`, but for the choice: there a memorization channel is on with
    probability ``p_mem``, here exactly ``own`` are on, ``p_mem`` times their number, rounded, and at least one. They
    are the first in an order of the channels that depends on nothing but seed, salt and example.

    Args:
        shape: Channels, or the shape of the mask of one example.
        count: Number of examples N, whose masks are then kept as a table of bits; None computes them when needed.
        p_gen: Share of generalization channels, 0 to 1; with 1 the layer does nothing.
        p_mem: Share of the memorization channels that are on for an example, 0 to 1; with 0 it is one channel.
        seed: Decides the masks.
        salt: Decides them as well: give each layer its own.
        rescale: Factor of the generalization channels in mode ``drop``.

    Attributes:
        p_mem: The share after rounding, so that mode ``scaled`` multiplies by the mean of the masks.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Nanfack and Belilovsky (2025), second-hand; "fair" is the equal number. Their text has a probability as well,
        which is :class:`memloc.dropout.ExampleTiedDropout`.

    Example:
        >>> layer = FairDropout(10, count=3, p_gen=0.2, p_mem=0.25)
        >>> layer.own, layer.masks_of(torch.arange(3)).sum(1)
        (2, tensor([4, 4, 4]))
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        count: int | None = None,
        *,
        p_gen: float = 0.2,
        p_mem: float = 0.2,
        seed: int = 0,
        salt: int = 0,
        rescale: float = 1.0,
    ):
        super().__init__(shape, count, p_gen=p_gen, p_mem=p_mem, seed=seed, salt=salt, rescale=rescale)
        self.p_mem = self.own / max(1, self._size - self._shared)

    @property
    def own(self) -> int:
        """How many memorization channels each example has."""
        pool = self._size - self._shared
        return min(pool, max(1, round(self.p_mem * pool)))

    def _draw(self, indices: Tensor) -> Tensor:
        """Compute the masks of some examples as zeros and ones, uint8, shape ``(B, size)``."""
        key = derive(self.seed, "masks", self.salt)
        channels = torch.arange(self._shared, self._size, device=indices.device)
        ranks = _shifted(_mixed(_mixed(indices * _STEP + key)[:, None] + channels * _STEP), 11)
        on = torch.zeros(len(indices), self._size, dtype=torch.uint8, device=indices.device)
        on[:, : self._shared] = 1
        return on.scatter_(1, self._shared + ranks.topk(self.own, largest=False).indices, 1)


def insert(
    model: nn.Module,
    place: str,
    *,
    shape: int | Sequence[int] | None = None,
    count: int | None = None,
    p_gen: float = 0.2,
    p_mem: float = 0.2,
    seed: int = 0,
) -> nn.Module:
    """Put FairDropout at one place of any network, in place.

    Args:
        model: Any network.
        place: A slot for dropout (:func:`memloc.dropout.slots`), which the layer replaces, or any other module by its
            name in the network, behind which it comes: the module and the layer become ``place.0`` and ``place.1``.
        shape: Channels of what the module puts out, or the shape of the mask; None takes the slot's.
        count: Examples, for the table of masks; None computes masks when they are needed.
        p_gen: Share of generalization channels.
        p_mem: Share of the memorization channels that are on for an example, at least one.
        seed: Decides the masks; a second layer gets a salt of its own.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such module, the shape is missing, or a share is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> insert(model, "1", shape=8, p_gen=0.5, p_mem=0.5)[1]
        Sequential(
          (0): ReLU()
          (1): FairDropout((8,), count=any, p_gen=0.5, p_mem=0.5, salt=0)
        )
    """
    known = dict(model.named_modules())
    if not place or place not in known:
        slots = ", ".join(dropout.slots(model)) or "none"
        raise ValueError(f"place must be a module of the network, got {place!r}; its slots for dropout: {slots}")
    module = known[place]
    sizes = module.shape if shape is None and isinstance(module, Slot) else shape
    if sizes is None:
        raise ValueError(f"shape must be the channels behind {place!r}, which is no slot for dropout, got None")
    salt = 1 + max((each.salt for each in known.values() if isinstance(each, _MASKED)), default=-1)
    layer = FairDropout(sizes, count, p_gen=p_gen, p_mem=p_mem, seed=seed, salt=salt)
    model.set_submodule(place, layer if isinstance(module, Slot) else nn.Sequential(module, layer))
    return model


_MASKED = ExampleTiedDropout | dropout.FixedDropout


@contextmanager
def masked(layer: ExampleTiedDropout, masks: Tensor) -> Iterator[None]:
    """Give every example other masks in mode ``own`` inside the block.

    Args:
        layer: Of example-tied dropout.
        masks: True where a channel is on. Bool, shape ``(N, *shape)`` of the layer.

    Raises:
        ValueError: If the masks are of another kind or shape.

    Example:
        >>> layer = FairDropout(4, count=2)
        >>> with masked(layer, torch.tensor([[False, True, False, True], [True, True, True, True]])):
        ...     with dropout.examples(layer, torch.tensor([0])):
        ...         layer(torch.ones(1, 4))
        tensor([[0., 1., 0., 1.]])
    """
    if masks.dtype != torch.bool or masks.shape[1:] != layer.shape or (layer.count or len(masks)) != len(masks):
        expected = f"bool ({layer.count or 'N'}, {', '.join(map(str, layer.shape))})"
        raise ValueError(f"masks must be {expected}, got {masks.dtype} {tuple(masks.shape)}")
    packed = np.packbits(masks.flatten(1).cpu().numpy(), 1, "little")
    before = layer.masks
    layer.masks = torch.from_numpy(packed).to(masks.device)
    try:
        yield
    finally:
        layer.masks = before


def treatments(layer: ExampleTiedDropout, indices: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Make the masks that tell whether memorization channels hold what belongs to their examples.

    Args:
        layer: Of example-tied dropout.
        indices: Training examples. Int64, shape ``(N,)``.
        seed: Decides which generalization channels go.

    Returns:
        By treatment, in the order of :data:`TREATMENTS`, what is on. Bool, shape ``(N, *shape)``.

        - ``own``: as in training;
        - ``another's``: the memorization channels of the example before in ``indices``, as many and not its own;
        - ``none``: no memorization channel, as after dropping;
        - ``own, fewer shared``: as ``own``, without as many generalization channels, drawn for each example, as it has
          memorization channels (all of them, if there are fewer);
        - ``all``: everything;
        - ``all but own``, ``all but another's``: everything without its own memorization channels, or another's.

    Example:
        >>> on = treatments(FairDropout(4, p_gen=0.5, p_mem=0.5), torch.arange(2))
        >>> on["own"].int().tolist(), on["another's"].int().tolist()
        ([[1, 1, 1, 0], [1, 1, 0, 1]], [[1, 1, 0, 1], [1, 1, 1, 0]])
        >>> on["none"].int().tolist(), on["all but own"].int().tolist()
        ([[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 0, 1], [1, 1, 1, 0]])
    """
    own = layer.masks_of(indices).flatten(1)
    shared = torch.arange(own.shape[1], device=own.device) < int(layer.p_gen * own.shape[1])
    tied, others = own & ~shared, (own & ~shared).roll(1, 0)
    scores = torch.rand(own.shape, generator=generator(seed, "fewer shared")).to(own.device)
    ranks = scores.masked_fill(~shared, math.inf).argsort(1).argsort(1)
    fewer = shared & (ranks >= tied.sum(1, keepdim=True))
    found = (own, shared | others, shared.expand_as(own), tied | fewer, torch.ones_like(own), ~tied, ~others)
    return {name: masks.unflatten(1, layer.shape) for name, masks in zip(TREATMENTS, found, strict=True)}


@dataclass(frozen=True, eq=False)
class Ablation:
    """How often a network is right about the training examples of each group, by which channels are on.

    Attributes:
        accuracies: Fractions, NaN for an empty group. Float64, shape ``(7, G)``, in the order of :data:`TREATMENTS`.
        group_names: What the ``G`` groups are called.
    """

    accuracies: Tensor
    group_names: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Return one row for each treatment, in their order, and a column for each group: accuracy, a fraction."""
        index = pd.Index(TREATMENTS, name="on")
        return pd.DataFrame(self.accuracies.cpu().numpy(), index, pd.Index(self.group_names))


def by_group(
    model: nn.Module,
    split: GroupedSplit,
    num_groups: int,
    *,
    mode: str = "drop",
    most: int | None = None,
    batch_size: int = 1000,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Tensor:
    """Measure how often a network is right in each group.

    Args:
        model: Any network on the device of the examples.
        split: Training, validation or test examples.
        num_groups: The number of groups ``G``.
        mode: Which channels example-tied dropout leaves on, one of :data:`memloc.dropout.MODES`; ``own`` is for
            training examples.
        most: How many examples, from the first; None takes all.
        batch_size: Images at a time.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        Fractions, NaN for an empty group. Float64, shape ``(G,)``.

    Example:
        >>> from memloc.groups import grouped
        >>> split = grouped(torch.eye(2)[..., None, None], torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> by_group(nn.Flatten(), split, 4)
        tensor([1., 0., nan, nan], dtype=torch.float64)
    """
    numerics: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "channels_last": channels_last}
    predictions = classes(predict(model, split.images[:most], mode=mode, **numerics))
    return group_accuracies(predictions, split.labels[:most], split.groups[:most], num_groups)


def ablate(
    model: nn.Module,
    data: GroupedData,
    *,
    seed: int = 0,
    batch_size: int = 1000,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Ablation:
    """Measure in each group of the training examples what switching off channels of example-tied dropout costs.

    If memorization channels hold what the network remembers of their examples, an example needs its own: another's, as
    many, do not serve. If they hold the minority, its groups need them more than the others do.

    Args:
        model: A network with example-tied dropout, of either kind.
        data: What it was trained on.
        seed: Decides which generalization channels go.
        batch_size: Images at a time.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        The accuracy of each group under each treatment (:func:`treatments`).

    Raises:
        ValueError: If the network has no such layer, or one for other examples.

    Source:
        Ours: the check that reviews of Nanfack and Belilovsky (2025) miss.
    """
    layers = [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]
    if not layers:
        raise ValueError("model must have a layer of example-tied dropout, got none: see fairdropout.insert")
    on = [treatments(layer, data.train.indices, seed) for layer in layers]
    numerics: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "channels_last": channels_last}
    rows = []
    for name in TREATMENTS:
        with ExitStack() as stack:
            for layer, masks in zip(layers, on, strict=True):
                stack.enter_context(masked(layer, masks[name]))
            rows.append(by_group(model, data.train, data.num_groups, mode="own", **numerics))
    return Ablation(torch.stack(rows), data.group_names)
