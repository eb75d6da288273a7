"""Images and labels as tensors on one device: embedded, official files, or a reader's own arrays.

An example's index is its position in the official training set. The files are those of :mod:`memloc.sources`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from memloc.sources import NAMES, SOURCES, Source, get, is_complete, read, root

__all__ = [
    "NAMES",
    "SOURCES",
    "Data",
    "Source",
    "Split",
    "augment",
    "from_arrays",
    "get",
    "is_complete",
    "load",
    "root",
]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples with the labels that a network is trained on and those that are right.

    Attributes:
        images: Float32, shape ``(N, C, H, W)``. Pixels in [0, 1] are scaled to ``(x - 0.5) / 0.5`` per
            channel, so black is -1 and white is 1.
        labels: The labels to train on. Int64, shape ``(N,)``.
        true_labels: The labels of the data set, never changed. Int64, shape ``(N,)``.
        noise_mask: Whether the label was replaced. Bool, shape ``(N,)``; all False until
            :func:`memloc.labelnoise.apply`.

    Example:
        >>> split = load("digits", examples=3).train
        >>> len(split), split.indices.tolist(), split.noise_mask.any().item()
        (3, [0, 1, 2], False)
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    noise_mask: Tensor

    def __repr__(self) -> str:
        shape, noisy = tuple(self.images.shape), int(self.noise_mask.sum())
        return f"Split(images {shape}, {noisy} noisy, on {self.images.device})"

    @property
    def indices(self) -> Tensor:
        """Position of every example in the split. Int64, shape ``(N,)``, on the device of the images."""
        return torch.arange(len(self), device=self.images.device)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Split":
        """Copy all four tensors to a device; what is there already is shared."""
        tensors = self.images, self.labels, self.true_labels, self.noise_mask
        return Split(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: what to train on, what to test on, and what the classes are called.

    Attributes:
        name: One of :data:`NAMES`, or what :func:`from_arrays` was given.
        classes: Names of the ``K`` classes, in the order of the labels.
        train: The training examples.
        test: The test examples, whose labels are never changed.

    Example:
        >>> data = load("digits")
        >>> data.num_classes, len(data.train), len(data.test), tuple(data.train.images.shape[1:])
        (10, 1297, 500, (1, 8, 8))
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """The number of classes ``K``."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> "Data":
        """Copy both splits to a device; what is there already is shared."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def with_labels(self, labels: Tensor, noise_mask: Tensor | None = None) -> "Data":
        """Replace the labels to train on; the true labels and the test set stay.

        Args:
            labels: Int64, shape ``(N,)``, from 0 to ``K - 1``.
            noise_mask: Which labels count as replaced. Bool, shape ``(N,)``; by default those that are not
                the true ones.

        Returns:
            Data that share images and true labels with these.

        Raises:
            ValueError: If labels or mask do not fit the training examples.

        Example:
            >>> data = load("digits", examples=3)
            >>> wrong = data.with_labels(torch.tensor([0, 1, 7]))
            >>> wrong.train.true_labels.tolist(), wrong.train.noise_mask.tolist()
            ([0, 1, 2], [False, False, True])
        """
        labels = labels.to(self.train.labels.device)
        _check_labels("labels", labels, len(self.train), self.num_classes)
        mask = labels != self.train.true_labels if noise_mask is None else noise_mask.to(labels.device)
        if mask.dtype != torch.bool or mask.shape != labels.shape:
            expected = f"bool {tuple(labels.shape)}"
            raise ValueError(f"noise_mask must be {expected}, got {mask.dtype} {tuple(mask.shape)}")
        return replace(self, train=replace(self.train, labels=labels, noise_mask=mask))


def load(
    name: str,
    *,
    size: int | None = None,
    examples: int | None = None,
    device: torch.device | str = "cpu",
    root: str | os.PathLike[str] | None = None,
) -> Data:
    """Read a data set into tensors on a device. Nothing is downloaded.

    The splits are the official ones. ``digits`` has none: scikit-learn's 1,797 images keep their order, the
    first 1,297 are for training and the last 500 for testing.

    Args:
        name: One of :data:`NAMES`.
        size: Side to resize the images to, in pixels, by nearest neighbour; by default they stay as they are.
        examples: Take only the first so many training examples; by default all of them.
        device: Where the tensors go.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        The data, every label true.

    Raises:
        ValueError: If an argument is out of range, or a file is not the official one.
        FileNotFoundError: If a file is not there.

    Source:
        The scaling is that of Maini et al. (2023): to [0, 1], then ``(x - 0.5) / 0.5`` per channel.

    Example:
        >>> data = load("digits", size=32, examples=1000)
        >>> data.train.images.shape, data.train.images.dtype
        (torch.Size([1000, 1, 32, 32]), torch.float32)
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    classes, (images, labels, test_images, test_labels) = read(name, root)
    if examples is not None:
        if not 1 <= examples <= len(images):
            raise ValueError(f"examples must be from 1 to {len(images)}, all that {name} has, got {examples}")
        images, labels = images[:examples], labels[:examples]
    if size is not None:
        images, test_images = (
            functional.interpolate(split, (size, size), mode="nearest") for split in (images, test_images)
        )
    return from_arrays(images, labels, test_images, test_labels, name=name, classes=classes, device=device)


def from_arrays(
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    test_images: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    *,
    name: str = "arrays",
    classes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Data:
    """Make a data set of arrays or tensors, which are copied.

    Args:
        images: Shape ``(N, C, H, W)``, or ``(N, H, W)`` for one channel. Uint8 is scaled like :func:`load`
            scales; floats are kept as they are given, as float32.
        labels: Integers from 0 to ``K - 1``, shape ``(N,)``.
        test_images: Like ``images``, of the same ``(C, H, W)``; may be empty.
        test_labels: Like ``labels``.
        name: What to call the data.
        classes: Names of the ``K`` classes; by default the numbers up to the largest label.
        device: Where the tensors go.

    Returns:
        The data, every label true.

    Raises:
        ValueError: If shapes, types or values do not fit.

    Example:
        >>> images, labels = np.zeros((4, 3, 5, 5), np.uint8), np.array([0, 1, 1, 0])
        >>> data = from_arrays(images, labels, images, labels, classes=("cat", "dog"))
        >>> data.train.images.unique().item(), data.num_classes
        (-1.0, 2)
    """
    pictures = _as_images("images", images, device), _as_images("test_images", test_images, device)
    numbers = _as_labels("labels", labels, device), _as_labels("test_labels", test_labels, device)
    if not len(pictures[0]):
        raise ValueError("images must hold at least one example, got none")
    if pictures[0].shape[1:] != pictures[1].shape[1:]:
        shapes = " and ".join(str(tuple(split.shape[1:])) for split in pictures)
        raise ValueError(f"images and test_images must have the same (C, H, W), got {shapes}")
    if classes is None:
        classes = [str(number) for number in range(int(torch.cat(numbers).amax()) + 1)]
    for argument, split, target in zip(("labels", "test_labels"), pictures, numbers, strict=True):
        _check_labels(argument, target, len(split), len(classes))
    train, test = (
        Split(split, target, target.clone(), torch.zeros_like(target, dtype=torch.bool))
        for split, target in zip(pictures, numbers, strict=True)
    )
    return Data(name, tuple(classes), train, test)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift and mirror every image at random.

    Each image is padded by an eighth of its side (4 pixels at 32) with -1, which is black after scaling,
    cropped at a random place to its old size, and mirrored left to right with probability 1/2.

    Args:
        images: Float, shape ``(B, C, H, W)``, on any device. Not changed.
        generator: A generator on the CPU, so that a GPU sees the same shifts as a laptop.

    Returns:
        Images of the same shape and type, on the same device.

    Source:
        The reference code of Maini et al. (2023) crops and mirrors CIFAR-10 like this. It makes 32 pixels of
        every image size and adds AutoAugment; neither is done here.

    Example:
        >>> images = torch.ones(5, 3, 8, 8)
        >>> augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 8, 8])
    """
    batch, channels, height, width = images.shape
    device, pad = images.device, (height // 8, width // 8)
    top, left = (torch.randint(2 * side + 1, (batch, 1), generator=generator).to(device) for side in pad)
    mirrored = (torch.rand(batch, 1, generator=generator) < 0.5).to(device)
    padded = functional.pad(images, (pad[1], pad[1], pad[0], pad[0]), value=-1.0)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    crops = padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, channels, -1))
    return crops.view(images.shape)


def _as_images(argument: str, images: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    tensor = _as_tensor(images)
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    if tensor.ndim != 4 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        expected = "uint8 or float of shape (N, C, H, W) or (N, H, W)"
        raise ValueError(f"{argument} must be {expected}, got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.shape[3] in (1, 3) and tensor.shape[1] == tensor.shape[2] > 3:
        raise ValueError(f"{argument} must have channels first, got {tuple(tensor.shape)}: transpose to (0, 3, 1, 2)")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{argument} must be finite, got NaN or infinity: clean the data first")
    scaled = tensor.to(device).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return scaled.div_(255).sub_(0.5).div_(0.5) if tensor.dtype == torch.uint8 else scaled


def _as_labels(argument: str, labels: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    tensor = _as_tensor(labels)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{argument} must be integers (N,), got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.to(device, torch.int64, copy=True)


def _as_tensor(array: Tensor | np.ndarray) -> Tensor:
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.require(array, requirements=("C", "W")))


def _check_labels(argument: str, labels: Tensor, examples: int, num_classes: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (examples,):
        raise ValueError(
            f"{argument} must be int64 ({examples},), one per image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if examples and not (labels.amin() >= 0 and labels.amax() < num_classes):
        found = f"{labels.amin().item()} to {labels.amax().item()}"
        raise ValueError(f"{argument} must be from 0 to {num_classes - 1} ({num_classes} classes), got {found}")
