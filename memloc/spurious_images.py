"""Images with a spurious attribute: coloured digits and digits on photographs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memloc import datasets
from memloc.groups import GroupedData, GroupedSplit, grouped
from memloc.randomness import generator
from memloc.sources import check_name

__all__ = ["ATTRIBUTES", "COLOURINGS", "PHOTOGRAPHS", "Colouring", "coloured_digits", "digits_on_photographs", "load"]

_CLASSES = ("5 to 9", "0 to 4")
_SCENES = ("airplane", "ship"), ("deer", "frog")  # classes of CIFAR-10

PHOTOGRAPHS: Mapping[str, tuple[str, str]] = {"samples": ("flower", "temple"), "cifar10": ("sky and sea", "land")}
"""Where :func:`digits_on_photographs` takes its backgrounds from, and the names of their two kinds."""

ATTRIBUTES = ("colour", *PHOTOGRAPHS)
"""What :func:`load` lets go along with the label: the digit's colour, or the kind of photograph it is on."""


@dataclass(frozen=True)
class Colouring:
    """How often labels and colours are wrong, in examples of even and of odd index and in the test set.

    Attributes:
        label_noise: Share of examples whose label is flipped, three fractions from 0 to 1.
        colour_noise: Share of examples whose colour is not their label's, three fractions from 0 to 1.

    Raises:
        ValueError: If there are not three fractions of each.

    Example:
        >>> COLOURINGS["color"].colour_noise
        (0.2, 0.1, 0.9)
    """

    label_noise: tuple[float, float, float]
    colour_noise: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, shares in (("label_noise", self.label_noise), ("colour_noise", self.colour_noise)):
            if len(shares) != 3 or not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"{name} must be three shares from 0 to 1 (even, odd, test), got {shares}")


COLOURINGS: Mapping[str, Colouring] = {
    "color": Colouring((0.25, 0.25, 0.25), (0.2, 0.1, 0.9)),
    "inverse": Colouring((0.15, 0.15, 0.15), (0.2, 0.3, 0.9)),
    "mcolor": Colouring((0.2, 0.3, 0.9), (0.15, 0.15, 0.15)),
    "v3": Colouring((0.2, 0.1, 0.9), (0.25, 0.25, 0.25)),
}
"""The published colourings: ColorMNIST and its three variants."""


def coloured_digits(
    name: str = "digits",
    colouring: Colouring = COLOURINGS["color"],
    *,
    seed: int,
    size: int = 14,
    examples: int | None = None,
    device: torch.device | str = "cpu",
    root: str | os.PathLike[str] | None = None,
) -> GroupedData:
    """Colour digits, by a colour that predicts the label better than the digit does until the test.

    The true label of a digit is 1 below 5 and 0 from 5. A share of the labels is flipped, for good: the group of an
    example is that of the label it got, and the flipped ones are noisy examples. The colour is the label, but for a
    share of the examples. An image has two channels, of which the one that the colour names shows the digit and the
    other one is black.

    Of the official training set the last sixth, rounded up, is for validation: 10,000 images of MNIST. Within training
    and validation, even and odd positions have shares of their own.

    Args:
        name: A data set of ten classes in grey, one of :data:`memloc.sources.NAMES`, e.g. ``"digits"`` or ``"mnist"``.
        colouring: How often labels and colours are wrong.
        seed: Decides which; the labels do not depend on the shares of colours.
        size: Side to resize the images to, in pixels, by nearest neighbour. Of MNIST, 14 takes every second pixel.
        examples: Take only the first so many training examples; by default all of them.
        device: Where the tensors go.
        root: The folder that holds the data sets; by default :func:`memloc.sources.root`.

    Returns:
        The data, images of shape ``(N, 2, size, size)``.

    Raises:
        ValueError: If an argument is out of range, or the data set is not of ten classes in grey.
        FileNotFoundError: If the data are not on this machine.

    Source:
        Arjovsky et al. (2019), ColorMNIST, with the splits and shares of Pezeshki et al. (2024), XRM. Unlike there
        black is -1 and not 0, as everywhere in this package, and that validation is coloured like training is ours.

    Example:
        >>> data = coloured_digits("digits", seed=0)
        >>> data.train, data.group_names[1]
        (GroupedSplit(images (1080, 2, 14, 14), ... noisy, on cpu, 2 attributes), '5 to 9, green')
    """
    if not isinstance(colouring, Colouring):
        raise ValueError(f"colouring must be a Colouring, got {colouring!r}: take one from COLOURINGS")
    splits = _digits(name, size, examples, root)

    def colour(split: str, images: Tensor, digits: Tensor) -> GroupedSplit:
        third = torch.arange(len(images)) % 2 if split != "test" else torch.full((len(images),), 2)

        def wrong(what: str, shares: tuple[float, float, float]) -> Tensor:
            drawn = torch.rand(len(images), generator=generator(seed, "coloured digits", split, what))
            return (drawn < torch.tensor(shares)[third]).long()

        true = (digits < 5).long()
        labels = true ^ wrong("labels", colouring.label_noise)
        colours = labels ^ wrong("colours", colouring.colour_noise)
        coloured = torch.full((len(images), 2, size, size), -1.0)
        coloured[torch.arange(len(images)), colours] = images[:, 0]
        return grouped(coloured, labels, colours, true_labels=true)

    train, validation, test = (colour(split, *parts) for split, parts in splits.items())
    return GroupedData(f"coloured {name}", _CLASSES, train, test, validation, ("red", "green")).to(device)


def digits_on_photographs(
    name: str = "digits",
    photographs: str = "samples",
    *,
    seed: int,
    size: int = 32,
    examples: int | None = None,
    correlation: float = 0.95,
    opacity: float = 1.0,
    device: torch.device | str = "cpu",
    root: str | os.PathLike[str] | None = None,
) -> GroupedData:
    """Paint white digits on photographs of two kinds, the kind going along with the label in training.

    The label is 1 for digits below 5 and 0 from 5, the attribute is the kind of photograph, drawn by
    :func:`memloc.spurious.correlated_attributes`; validation and test have a correlation of 1/2. Each example gets a
    random photograph of its kind, or a random cut-out of one, with replacement; splits share neither digits nor
    photographs. These are dimmed to half their brightness, so that white shows on any sky; where a digit has the
    brightness ``p`` from 0 to 1, the image is ``(1 - opacity p) photograph + opacity p white``.

    Kinds of ``"samples"``, which scikit-learn brings: 0 a flower, 1 a temple, every second pixel of one photograph each
    (CC BY 2.0, by vultilion and danielbuechele). Of five vertical stripes, cut-outs from the first, third and fifth are
    for training, from the second for validation, from the fourth for testing. Kinds of ``"cifar10"``: 0 sky and sea
    (airplane, ship), 1 land (deer, frog). Of the digits and of CIFAR-10's training images the last sixth is for
    validation.

    Args:
        name: A data set of ten classes in grey, e.g. ``"digits"`` or ``"mnist"``.
        photographs: A key of :data:`PHOTOGRAPHS`.
        seed: Decides attributes and photographs.
        size: Side of the images in pixels, 12 size² bytes each; digits and CIFAR-10 are resized by nearest neighbour.
            ``"samples"`` has room for 64 at most.
        examples: Take only the first so many training examples; by default all of them.
        correlation: Share of the training examples whose attribute is the label, 0 to 1.
        opacity: Of the digits, above 0 and up to 1; a faint digit is harder to see than the photograph's kind.
        device: Where the tensors go.
        root: The folder that holds the data sets; by default :func:`memloc.sources.root`.

    Returns:
        The data, images of shape ``(N, 3, size, size)``.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If the data are not on this machine.

    Source:
        Ours, after Waterbirds (Sagawa et al. 2020): birds there, digits here.

    Example:
        >>> data = digits_on_photographs(seed=0, examples=400)
        >>> tuple(data.train.images.shape), (data.train.attributes != data.train.labels).sum().item()
        ((400, 3, 32, 32), 20)
    """
    if not 0 < opacity <= 1:
        raise ValueError(f"opacity must be above 0 and at most 1, got {opacity}")
    check_name(photographs, PHOTOGRAPHS, "photographs")
    from memloc.spurious import correlated_attributes  # not above: it brings scipy.stats, which takes a second

    splits = _digits(name, size, examples, root)
    kinds = _samples(size) if photographs == "samples" else _scenes(size, root)

    def paint(split: str, images: Tensor, digits: Tensor) -> GroupedSplit:
        rng = generator(seed, "digits on photographs", split)
        labels = (digits < 5).long()
        attributes = correlated_attributes(labels, correlation if split == "train" else 0.5, rng)
        painted = torch.empty(len(images), 3, size, size)
        for kind, pool in enumerate(kinds[split]):
            chosen = (attributes == kind).nonzero()[:, 0]
            painted[chosen] = _cut_outs(pool, len(chosen), size, rng) / 2 - 0.5
        return grouped(painted.lerp_(torch.ones(()), opacity * (images + 1) / 2), labels, attributes)

    train, validation, test = (paint(split, *parts) for split, parts in splits.items())
    title = f"{name} on {photographs}"
    return GroupedData(title, _CLASSES, train, test, validation, PHOTOGRAPHS[photographs]).to(device)


def load(
    name: str,
    attribute: str,
    *,
    seed: int,
    size: int | None = None,
    examples: int | None = None,
    correlation: float = 0.95,
    opacity: float = 1.0,
    device: torch.device | str = "cpu",
    root: str | os.PathLike[str] | None = None,
) -> GroupedData:
    """Make one of the data sets with a spurious attribute by name, as recipes do.

    Args:
        name: A data set of ten classes in grey, e.g. ``"digits"`` or ``"mnist"``.
        attribute: One of :data:`ATTRIBUTES`. ``"colour"`` gives :func:`coloured_digits` with the colouring ``"color"``,
            ``"samples"`` and ``"cifar10"`` give :func:`digits_on_photographs` of that kind.
        seed: Decides the attributes, and what they look like.
        size: Side of the images in pixels; None takes 14 for colours and 32 on photographs.
        examples: Take only the first so many training examples; by default all of them.
        correlation: Share of the training examples whose attribute is the label, on photographs; colours have shares
            of their own.
        opacity: Of the digits on photographs.
        device: Where the tensors go.
        root: The folder that holds the data sets; by default :func:`memloc.sources.root`.

    Returns:
        The data.

    Raises:
        ValueError: If an argument is out of range, or the data set is not of ten classes in grey.
        FileNotFoundError: If the data are not on this machine.

    Example:
        >>> load("digits", "samples", seed=0, examples=100).name
        'digits on samples'
    """
    check_name(attribute, ATTRIBUTES, "attribute")
    which: dict[str, Any] = {"seed": seed, "examples": examples, "device": device, "root": root}
    if size is not None:
        which["size"] = size
    if attribute == "colour":
        return coloured_digits(name, **which)
    return digits_on_photographs(name, attribute, correlation=correlation, opacity=opacity, **which)


def _digits(
    name: str, size: int, examples: int | None, root: str | os.PathLike[str] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Load images ``(N, 1, size, size)`` and digits of train, validation and test; the first five sixths are train."""
    data = datasets.load(name, size=size, root=root)
    channels = data.train.images.shape[1]
    if channels != 1 or data.num_classes != 10:
        raise ValueError(f"name must be of ten classes in grey, got {name}: {data.num_classes}, {channels} channels")
    images, digits = data.train.images, data.train.labels
    cut = len(images) * 5 // 6
    taken = cut if examples is None else examples
    if not isinstance(taken, int) or not 1 <= taken <= cut:
        raise ValueError(f"examples must be from 1 to {cut}, all that {name} has for training, got {examples}")
    return {
        "train": (images[:taken], digits[:taken]),
        "validation": (images[cut:], digits[cut:]),
        "test": (data.test.images, data.test.labels),
    }


def _samples(size: int) -> dict[str, list[Tensor]]:
    """Cut each of scikit-learn's photographs into five stripes, shape ``(P, 3, 213, 64)``."""
    from sklearn.datasets import load_sample_image

    pools: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for file in ("flower.jpg", "china.jpg"):
        pixels = np.ascontiguousarray(load_sample_image(file)[::2, ::2].transpose(2, 0, 1))
        photograph = torch.from_numpy(pixels).float().div_(255).sub_(0.5).div_(0.5)
        width = photograph.shape[2] // 5
        if size > width:
            raise ValueError(f"size must be at most {width} pixels with samples, got {size}: take cifar10")
        stripes = torch.stack(photograph.split(width, 2))
        for pool, chosen in zip(pools.values(), (slice(0, None, 2), slice(1, 2), slice(3, 4)), strict=True):
            pool.append(stripes[chosen])
    return pools


def _scenes(size: int, root: str | os.PathLike[str] | None) -> dict[str, list[Tensor]]:
    """Take CIFAR-10's images of the classes of each kind, shape ``(P, 3, size, size)``."""
    data = datasets.load("cifar10", size=size, root=root)
    pools: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for scene in _SCENES:
        numbers = torch.tensor([data.classes.index(label) for label in scene])
        train, test = (split.images[torch.isin(split.labels, numbers)] for split in (data.train, data.test))
        cut = len(train) * 5 // 6
        for pool, images in zip(pools.values(), (train[:cut], train[cut:], test), strict=True):
            pool.append(images)
    return pools


def _cut_outs(pool: Tensor, count: int, size: int, rng: torch.Generator) -> Tensor:
    """Cut random squares out of random photographs of shape ``(P, C, H, W)``."""
    photographs, channels, height, width = pool.shape
    which = torch.randint(photographs, (count, 1, 1, 1), generator=rng)
    top = torch.randint(height - size + 1, (count, 1, 1, 1), generator=rng)
    left = torch.randint(width - size + 1, (count, 1, 1, 1), generator=rng)
    rows, columns = top + torch.arange(size)[:, None], left + torch.arange(size)
    return pool[which, torch.arange(channels)[:, None, None], rows, columns]
