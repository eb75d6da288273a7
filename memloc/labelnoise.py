"""Replace training labels by wrong ones: at random, by permuting them, by confusion, or by what people answered.

Noise is a function of the true labels, a rate and a seed. Test labels are never touched.
"""

import io
import math
import os
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memloc import cscores, sources
from memloc.datasets import Data
from memloc.randomness import generator

_HUMAN = {  # our kind and the name of the published array
    "human-aggregate": "aggre_label",
    "human-random1": "random_label1",
    "human-random2": "random_label2",
    "human-random3": "random_label3",
    "human-worse": "worse_label",
}

KINDS: tuple[str, ...] = ("flip", "parity", "permute", "confuse", *_HUMAN)
"""The kinds of label noise that :func:`apply` knows."""


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels of which some are wrong.

    Attributes:
        labels: The labels to train on. Int64, shape ``(N,)``.
        true_labels: The labels as they came. Int64, shape ``(N,)``.
        noise_mask: Whether the label was replaced. Bool, shape ``(N,)``.

    Example:
        >>> noisy = flip_labels(torch.tensor([0, 1]), 1.0, num_classes=2, seed=0)
        >>> noisy.labels, noisy.true_labels, noisy.noise_mask
        (tensor([1, 0]), tensor([0, 1]), tensor([True, True]))
    """

    labels: Tensor
    true_labels: Tensor
    noise_mask: Tensor


def flip_labels(labels: Tensor, noise_rate: float, num_classes: int, seed: int, *, parity: bool = False) -> NoisyLabels:
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
        raise ValueError(f"num_classes must be at least {fewest} for {kind}, got {num_classes}: no wrong class is left")
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
        Stephenson et al. (2021). How they treat a permuted label that stays right is not stated.

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


def confuse_labels(images: Tensor, labels: Tensor, noise_rate: float, num_classes: int, seed: int) -> NoisyLabels:
    """Replace the labels of ambiguous examples by the classes that they are mistaken for.

    An imitation of human errors. Each class has a frequency with which a nearest-neighbour classifier gives it to an
    example that it was not trained on (:func:`memloc.cscores.held_out_votes`). Exactly ``floor(noise_rate * N)``
    examples are drawn without replacement, with probabilities in proportion to the frequency of a wrong class, and the
    new label of each among the wrong classes in proportion to theirs.

    Args:
        images: The images. Shape ``(N, …)``, at least two.
        labels: The true labels. Int64, shape ``(N,)``, from 0 to ``K - 1``.
        noise_rate: Share of labels to replace, 0 to 1.
        num_classes: The number of classes ``K``, at least two.
        seed: Decides which labels are replaced, and by what.

    Returns:
        The noisy labels, on the device of ``labels``. ``noise_mask`` marks the replaced ones, all of them wrong.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Ours, for data that nobody has labelled wrongly.

    Example:
        >>> images, labels = torch.tensor([[0.0], [0.1], [0.2], [0.3], [4.0], [4.1]]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> confuse_labels(images, labels, 0.17, num_classes=2, seed=2).labels  # the fourth lies among zeros
        tensor([0, 0, 0, 0, 1, 1])
    """
    _check(labels, noise_rate, num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 to be confused, got {num_classes}: no wrong class is left")
    count = math.floor(noise_rate * len(labels))
    if count == 0:
        return NoisyLabels(labels.clone(), labels, torch.zeros_like(labels, dtype=torch.bool))
    votes = cscores.held_out_votes(images, labels).cpu().double()
    wrong = torch.full((len(labels), num_classes), 1e-6, dtype=torch.float64)  # no wrong class is impossible
    wrong[:, : votes.shape[1]] += votes
    wrong.scatter_(1, labels.cpu()[:, None], 0.0)
    rng = generator(seed, "confusion")
    chosen = wrong.sum(1).multinomial(count, generator=rng)
    replacements = wrong[chosen].multinomial(1, generator=rng).squeeze(1)
    return _replaced(labels, chosen.to(labels.device), replacements.to(labels.device))


def human_labels(kind: str, true_labels: Tensor, root: str | os.PathLike[str] | None = None) -> NoisyLabels:
    """Read the labels that people gave to the training images of CIFAR-10.

    The file is ``cifar-10n/CIFAR-10_human.pt`` below the root, as its authors publish it. It is a pickle: if
    its checksum is right, torch's restricted loader reads it, which calls only what rebuilds a NumPy array.

    Args:
        kind: One of ``human-aggregate`` (majority of three answers), ``human-random1``, ``human-random2``,
            ``human-random3`` (one answer each), ``human-worse`` (a wrong answer wherever one was given).
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
    clean, answers = _read_human(root, _HUMAN[kind])
    if not torch.equal(clean[: len(true_labels)], true_labels.cpu()):
        raise ValueError("true_labels must be those of the first training images of CIFAR-10, in their order")
    labels = answers[: len(true_labels)].to(true_labels.device)
    return NoisyLabels(labels, true_labels, labels != true_labels)


def apply(data: Data, kind: str, noise_rate: float, seed: int, root: str | os.PathLike[str] | None = None) -> Data:
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
        >>> from memloc import datasets
        >>> noisy = apply(datasets.load("digits", examples=100), "flip", 0.1, seed=0)
        >>> noisy.train.noise_mask.sum().item(), noisy.test.noise_mask.sum().item()
        (10, 0)
    """
    true_labels = data.train.true_labels
    if kind in ("flip", "parity"):
        noisy = flip_labels(true_labels, noise_rate, data.num_classes, seed, parity=kind == "parity")
    elif kind == "permute":
        noisy = permute_labels(true_labels, noise_rate, seed)
    elif kind == "confuse":
        noisy = confuse_labels(data.train.images, true_labels, noise_rate, data.num_classes, seed)
    elif kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    elif data.name != "cifar10":
        raise ValueError(f"{kind} labels are of cifar10, got {data.name}: take cifar10, or flip labels")
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


def _read_human(root: str | os.PathLike[str] | None, array: str) -> tuple[Tensor, Tensor]:
    """Read the true labels and one set of answers from CIFAR-10N's file. Int64, shape ``(50000,)`` each."""
    (content,) = sources.contents("cifar-10n", root)
    rebuild = np.empty(0).__reduce__()[0]  # how NumPy pickles an array; it has no public name
    allowed: list[Any] = [
        rebuild,
        (rebuild, "numpy.core.multiarray._reconstruct"),  # its place before NumPy 2
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            arrays = torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("the labels of cifar-10n must be NumPy arrays and nothing else: refused") from error
    return torch.from_numpy(arrays["clean_label"]), torch.from_numpy(arrays[array])
