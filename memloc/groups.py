"""Examples in groups of label and attribute, and how often a network is right in each group."""

import math
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from memloc.datasets import Data, Split

__all__ = [
    "GroupedData",
    "GroupedSplit",
    "group_accuracies",
    "group_counts",
    "grouped",
    "worst_group_accuracy",
]


@dataclass(frozen=True, eq=False)
class GroupedSplit(Split):
    """Examples with labels and with an attribute, which may go along with the label without being its reason.

    Attributes:
        images: Float32, shape ``(N, C, H, W)``, or feature vectors, shape ``(N, D)``.
        labels: The labels to train on. Int64, shape ``(N,)``.
        true_labels: The labels before any of them was replaced. Int64, shape ``(N,)``.
        noise_mask: Whether the label was replaced. Bool, shape ``(N,)``.
        attributes: The attribute ``a`` of each example. Int64, shape ``(N,)``, from 0 to ``A - 1``.
        num_attributes: The number ``A`` of values that the attribute can have.

    Example:
        >>> split = grouped(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        >>> split.groups
        tensor([0, 2, 3])
    """

    attributes: Tensor
    num_attributes: int

    def __repr__(self) -> str:
        return f"Grouped{super().__repr__()[:-1]}, {self.num_attributes} attributes)"

    @property
    def groups(self) -> Tensor:
        """The group ``A * y + a`` of every example, by the label it is trained on. Int64, shape ``(N,)``."""
        return self.num_attributes * self.labels + self.attributes

    def to(self, device: torch.device | str) -> "GroupedSplit":
        """Copy all five tensors to a device; what is there already is shared."""
        plain = super().to(device)
        tensors = plain.images, plain.labels, plain.true_labels, plain.noise_mask
        return GroupedSplit(*tensors, self.attributes.to(device), self.num_attributes)


@dataclass(frozen=True, eq=False)
class GroupedData(Data):
    """A data set in which every example belongs to a group; :func:`memloc.training.train` takes it as it is.

    Attributes:
        name: What the data are called.
        classes: Names of the ``K`` classes, in the order of the labels.
        train: The training examples.
        test: The test examples.
        validation: The examples to choose a model by.
        attribute_names: Names of the ``A`` attributes, in their order.

    Raises:
        ValueError: If a split has another number of attributes than there are names.

    Example:
        >>> split = grouped(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        >>> data = GroupedData("birds", ("land bird", "water bird"), split, split, split, ("land", "water"))
        >>> data.table()[["group", "train"]]
                        group  train
        0     land bird, land      1
        1    land bird, water      0
        2    water bird, land      1
        3   water bird, water      1
    """

    train: GroupedSplit
    test: GroupedSplit
    validation: GroupedSplit
    attribute_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for split in (self.train, self.validation, self.test):
            if split.num_attributes != len(self.attribute_names):
                names = f"{len(self.attribute_names)} ({', '.join(self.attribute_names)})"
                raise ValueError(f"attribute_names must be one per attribute, {split.num_attributes}, got {names}")

    @property
    def num_groups(self) -> int:
        """The number ``G = K * A`` of groups; some may be empty."""
        return self.num_classes * len(self.attribute_names)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Label and attribute of each of the ``G`` groups, in their order."""
        return tuple(f"{label}, {attribute}" for label in self.classes for attribute in self.attribute_names)

    def to(self, device: torch.device | str) -> "GroupedData":
        """Copy the three splits to a device; what is there already is shared."""
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)

    def table(self) -> pd.DataFrame:
        """Count the examples of each group.

        Returns:
            One row a group, in their order: ``group`` (its name), ``label``, ``attribute`` (numbers), ``train``,
            ``validation``, ``test`` (examples).
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = {name: group_counts(split.groups, self.num_groups).tolist() for name, split in splits.items()}
        label, attribute = zip(
            *((y, a) for y in range(self.num_classes) for a in range(len(self.attribute_names))), strict=True
        )
        return pd.DataFrame({"group": self.group_names, "label": label, "attribute": attribute} | counts)


def grouped(
    images: Tensor,
    labels: Tensor,
    attributes: Tensor,
    *,
    num_attributes: int = 2,
    true_labels: Tensor | None = None,
) -> GroupedSplit:
    """Make a split of tensors, which are shared.

    Args:
        images: Float32, shape ``(N, C, H, W)`` or ``(N, D)``.
        labels: The labels to train on. Int64, shape ``(N,)``.
        attributes: Int64, shape ``(N,)``, from 0 to ``A - 1``.
        num_attributes: The number ``A`` of values that the attribute can have.
        true_labels: What the labels were before some were replaced. Int64, shape ``(N,)``; by default all are true.

    Returns:
        The split; the labels that differ from the true ones are noisy.

    Raises:
        ValueError: If labels or attributes do not fit the images.

    Example:
        >>> labels, true_labels = torch.tensor([0, 1]), torch.tensor([1, 1])
        >>> grouped(torch.zeros(2, 1, 8, 8), labels, labels, true_labels=true_labels)
        GroupedSplit(images (2, 1, 8, 8), 1 noisy, on cpu, 2 attributes)
    """
    true = labels.clone() if true_labels is None else true_labels
    for name, found in (("labels", labels), ("true_labels", true), ("attributes", attributes)):
        if found.dtype != torch.int64 or found.shape != (len(images),):
            expected = f"int64 ({len(images)},), one per image"
            raise ValueError(f"{name} must be {expected}, got {found.dtype} {tuple(found.shape)}")
    if not ((attributes >= 0) & (attributes < num_attributes)).all():
        values = f"{attributes.amin().item()} to {attributes.amax().item()}"
        raise ValueError(f"attributes must be from 0 to {num_attributes - 1}, got {values}")
    return GroupedSplit(images, labels, true, labels != true, attributes, num_attributes)


def group_counts(groups: Tensor, num_groups: int) -> Tensor:
    """Count the examples of each group.

    Args:
        groups: The group of each example. Int64, shape ``(N,)``, from 0 to ``G - 1``.
        num_groups: The number of groups ``G``.

    Returns:
        Int64, shape ``(G,)``, on the device of ``groups``.

    Raises:
        ValueError: If a group is out of range.

    Example:
        >>> group_counts(torch.tensor([0, 3, 3]), 4)
        tensor([1, 0, 0, 2])
    """
    if not ((groups >= 0) & (groups < num_groups)).all():
        found = f"{groups.amin().item()} to {groups.amax().item()}"
        raise ValueError(f"groups must be from 0 to {num_groups - 1}, got {found}: count the empty ones too")
    return groups.bincount(minlength=num_groups)


def group_accuracies(predictions: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Compute the share of right predictions in each group.

    Args:
        predictions: Predicted classes. Int64, shape ``(..., N)``: one row for each network, if there are several.
        labels: What counts as right. Int64, shape ``(N,)``.
        groups: The group of each example. Int64, shape ``(N,)``, from 0 to ``G - 1``.
        num_groups: The number of groups ``G``.

    Returns:
        Fractions from 0 to 1, NaN for an empty group. Float64, shape ``(..., G)``.

    Raises:
        ValueError: If shapes do not fit or a group is out of range.

    Example:
        >>> right = torch.tensor([1, 1, 0])
        >>> group_accuracies(torch.tensor([[1, 1, 0], [1, 0, 1]]), right, torch.tensor([3, 3, 0]), 4)
        tensor([[1.0000,    nan,    nan, 1.0000],
                [0.0000,    nan,    nan, 0.5000]], dtype=torch.float64)
    """
    if labels.ndim != 1 or groups.shape != labels.shape or predictions.shape[-1:] != labels.shape:
        shapes = f"{tuple(predictions.shape)}, {tuple(labels.shape)} and {tuple(groups.shape)}"
        raise ValueError(f"predictions, labels and groups must be (..., N), (N,) and (N,), got {shapes}")
    counts = group_counts(groups, num_groups)
    is_right = (predictions == labels).double()
    sums = is_right.new_zeros(*predictions.shape[:-1], num_groups).index_add_(-1, groups, is_right)
    return sums / counts


def worst_group_accuracy(accuracies: Tensor) -> Tensor:
    """Take the accuracy of the group in which a network is worst; empty groups do not count.

    Args:
        accuracies: From :func:`group_accuracies`. Shape ``(..., G)``.

    Returns:
        Fractions from 0 to 1, NaN where all groups are empty. Shape ``(...)``.

    Example:
        >>> worst_group_accuracy(torch.tensor([0.9, float("nan"), 0.2]))
        tensor(0.2000)
    """
    worst = accuracies.nan_to_num(nan=math.inf).amin(-1)
    return worst.masked_fill(worst.isinf(), math.nan)
