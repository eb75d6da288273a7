"""Replace training labels by wrong ones: at random, by permuting them, or by what people answered.

Noise is a function of the true labels, a rate and a seed. Test labels are never touched.
"""

import hashlib
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memloc import datasets
from memloc.datasets import Data
from memloc.randomness import generator

_HUMAN = {  # our kind: CIFAR-10N's array and the MD5 of its 50,000 labels as bytes
    "human-aggregate": ("aggre_label", "4c923cb1af2aee8a8ad935b5aa4a71e8"),
    "human-random1": ("random_label1", "b2bfe565c66e32e0240ddc3b23b8b9e2"),
    "human-random2": ("random_label2", "2b82ae63b0a579ce80d1f57b2c38b313"),
    "human-random3": ("random_label3", "dbc67e1f13d8fc043fce72a07e745db5"),
    "human-worse": ("worse_label", "ea8c18d6bc66d6bed531867413bd9b38"),
}
_FILES = ("CIFAR-10_human.pt", "CIFAR-10_human.npz")
_REPAIR = "`memloc data get cifar-10n` says where to fetch it anew"

KINDS: tuple[str, ...] = ("flip", "parity", "permute", *_HUMAN)
"""The kinds of label noise that :func:`apply` knows."""


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels of which some are wrong.

    Attributes:
        labels: The labels to train on. Int64, shape ``(N,)``.
        true_labels: The labels as they came. Int64, shape ``(N,)``.
        noise_mask: Whether the label was replaced. Bool, shape ``(N,)``.
    """

    labels: Tensor
    true_labels: Tensor
    noise_mask: Tensor


def flip_labels(
    labels: Tensor, noise_rate: float, num_classes: int, seed: int, *, parity: bool = False
) -> NoisyLabels:
    """Replace a share of the labels by a wrong class, drawn uniformly.

    Exactly ``floor(noise_rate * N)`` labels are replaced, at places drawn without replacement. The product
    is the floating-point one: 0.29 of 100 are 28, because ``0.29 * 100`` is 28.999999999999996.

    Args:
        labels: The true labels. Int64, shape ``(N,)``, from 0 to ``K - 1``.
        noise_rate: Share of labels to replace, 0 to 1.
        num_classes: The number of classes ``K``.
        seed: Decides which labels are replaced, and by what.
        parity: Draw as the paper's reference code draws: NumPy's generator seeded with ``seed``, and the new
            label is the true one plus 1 to ``K - 2``, modulo ``K``, so that of the ``K - 1`` wrong classes
            the one before the true class never comes. Needs three classes.

    Returns:
        The noisy labels, on the device of ``labels``. ``noise_mask`` marks the replaced ones, all of them
        wrong.

    Raises:
        ValueError: If an argument is out of range, or there are too few classes to be wrong.

    Source:
        Maini et al. (2023); their reference code is repeated by ``parity``. Without it all ``K - 1`` wrong
        classes come.

    Example:
        >>> noisy = flip_labels(torch.zeros(10, dtype=torch.int64), 0.3, num_classes=2, seed=0)
        >>> noisy.labels.sum().item(), torch.equal(noisy.noise_mask, noisy.labels == 1)
        (3, True)
    """
    _check(labels, noise_rate, num_classes)
    fewest = 3 if parity else 2
    if noise_rate > 0 and num_classes < fewest:
        kind = "the reference code's flips" if parity else "flips"
        raise ValueError(
            f"num_classes must be at least {fewest} for {kind}, got {num_classes}: no wrong class is left"
        )
    count = math.floor(noise_rate * len(labels))
    if count == 0:
        return NoisyLabels(labels.clone(), labels, torch.zeros_like(labels, dtype=torch.bool))
    if parity:
        numpy_rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(numpy_rng.choice(len(labels), count, replace=False))
        offsets = torch.from_numpy(numpy_rng.integers(1, num_classes - 1, count))
    else:
        rng = generator(seed, "flips")
        chosen = torch.randperm(len(labels), generator=rng)[:count]
        offsets = torch.randint(1, num_classes, (count,), generator=rng)
    chosen, offsets = chosen.to(labels.device), offsets.to(labels.device)
    return _replaced(labels, chosen, (labels[chosen] + offsets) % num_classes)


def permute_labels(labels: Tensor, noise_rate: float, seed: int) -> NoisyLabels:
    """Permute the labels within a random subset, so that the number of examples per label stays.

    Of the ``floor(noise_rate * N)`` examples in the subset about ``1 / K`` draw their own class again. They
    stay: ``noise_mask`` marks the whole subset, "permuted" in the paper, and ``labels != true_labels`` those
    whose label is wrong.

    Args:
        labels: The true labels. Int64, shape ``(N,)``.
        noise_rate: Share of the examples in the subset, 0 to 1.
        seed: Decides the subset and the permutation.

    Returns:
        The noisy labels, on the device of ``labels``.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Stephenson et al. (2021), who permute half of the labels. Whether they redraw a label that stays
        right is not stated; here it is not redrawn.

    Example:
        >>> noisy = permute_labels(torch.arange(100), 0.5, seed=0)
        >>> noisy.noise_mask.sum().item(), torch.equal(noisy.labels.sort().values, noisy.true_labels)
        (50, True)
    """
    _check(labels, noise_rate)
    rng = generator(seed, "permutation")
    count = math.floor(noise_rate * len(labels))
    chosen = torch.randperm(len(labels), generator=rng)[:count].to(labels.device)
    order = torch.randperm(count, generator=rng).to(labels.device)
    return _replaced(labels, chosen, labels[chosen[order]])


def human_labels(kind: str, true_labels: Tensor, root: str | os.PathLike[str] | None = None) -> NoisyLabels:
    """Read the labels that people gave to the training images of CIFAR-10.

    The file is ``cifar-10n/CIFAR-10_human.pt`` below the root, as its authors publish it, or
    ``CIFAR-10_human.npz`` with the same arrays. The first is a pickle: it is read by torch's restricted
    loader, which runs nothing and here accepts NumPy arrays alone.

    Args:
        kind: One of ``human-aggregate`` (majority of three answers), ``human-random1``, ``human-random2``,
            ``human-random3`` (one answer each), ``human-worse`` (a wrong answer wherever there is one).
        true_labels: The labels of CIFAR-10's training images, or of the first ``N`` of them. Int64, shape
            ``(N,)``.
        root: The folder that holds the data sets; by default :func:`memloc.sources.root`.

    Returns:
        The human labels of the same images; ``noise_mask`` marks those that differ from the true ones.

    Raises:
        ValueError: If the kind is unknown, the file is not the official one, or its images have other true
            labels.
        FileNotFoundError: If the file is not there.

    Source:
        Wei et al. (2022), CIFAR-10N: 9.01, 17.23, 18.12, 17.64 and 40.21 % of the labels differ, in the
        order above.
    """
    if kind not in _HUMAN:
        raise ValueError(f"kind must be one of {', '.join(_HUMAN)}, got {kind!r}")
    _check(true_labels, 0.0)
    folder = (datasets.root() if root is None else Path(root)) / "cifar-10n"
    path = next((path for path in (folder / file for file in _FILES) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder / _FILES[0]} is missing: `memloc data get cifar-10n` says where to fetch it, "
            "or set MEMLOC_DATA to the folder that holds cifar-10n"
        )
    clean, answers = _read_human(path, *_HUMAN[kind])
    if not torch.equal(clean[: len(true_labels)], true_labels.cpu()):
        raise ValueError(f"true_labels must be those of CIFAR-10's first training images: {path} has others")
    labels = answers[: len(true_labels)].to(true_labels.device)
    return NoisyLabels(labels, true_labels, labels != true_labels)


def apply(
    data: Data, kind: str, noise_rate: float, seed: int, root: str | os.PathLike[str] | None = None
) -> Data:
    """Put noise on the training labels of a data set, starting from the true ones.

    Args:
        data: Any data; the human kinds need ``cifar10``, of which the first ``N`` examples will do.
        kind: One of :data:`KINDS`.
        noise_rate: Share of labels to replace, 0 to 1. The human kinds bring their own rate and ignore it,
            and the seed.
        seed: Decides which labels are replaced, and by what.
        root: The folder that holds the human labels; by default :func:`memloc.sources.root`.

    Returns:
        Data with the same images, true labels and test set.

    Raises:
        ValueError: If an argument is out of range or does not fit the data.
        FileNotFoundError: If the human labels are not there.

    Example:
        >>> noisy = apply(datasets.load("digits", examples=100), "flip", 0.1, seed=0)
        >>> noisy.train.noise_mask.sum().item(), noisy.test.noise_mask.sum().item()
        (10, 0)
    """
    true_labels = data.train.true_labels
    if kind in ("flip", "parity"):
        noisy = flip_labels(true_labels, noise_rate, data.num_classes, seed, parity=kind == "parity")
    elif kind == "permute":
        noisy = permute_labels(true_labels, noise_rate, seed)
    elif kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    elif data.name != "cifar10":
        raise ValueError(
            f"{kind} labels are of cifar10, got {data.name}: take cifar10, or flip, parity or permute"
        )
    else:
        noisy = human_labels(kind, true_labels, root)
    return data.with_labels(noisy.labels, noisy.noise_mask)


def _check(labels: Tensor, noise_rate: float, num_classes: int | None = None) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(f"labels must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
    if not 0 <= noise_rate <= 1:
        raise ValueError(f"noise_rate must be from 0 to 1, a share and not percent, got {noise_rate}")
    if num_classes is not None and not ((labels >= 0) & (labels < num_classes)).all():
        found = f"{labels.amin().item()} to {labels.amax().item()}"
        raise ValueError(f"labels must be from 0 to {num_classes - 1} ({num_classes} classes), got {found}")


def _replaced(labels: Tensor, chosen: Tensor, replacements: Tensor) -> NoisyLabels:
    noisy, mask = labels.clone(), torch.zeros_like(labels, dtype=torch.bool)
    noisy[chosen], mask[chosen] = replacements, True
    return NoisyLabels(noisy, labels, mask)


def _read_human(path: Path, array: str, md5: str) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10N's true labels and one of its label sets, checked. Int64, shape ``(50000,)`` each."""
    try:
        arrays = _load_arrays(path)
        clean, answers = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("clean_label", array))
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path} is no file of CIFAR-10N, so it is not read: {_REPAIR}") from error
    found = hashlib.md5(answers.numpy().astype(np.uint8).tobytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} has altered labels in {array} (MD5 {found}, expected {md5}): {_REPAIR}")
    return clean, answers


def _load_arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    rebuild = np.empty(0).__reduce__()[0]  # the function with which NumPy pickles its arrays, private by name
    allowed: list[Any] = [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)
