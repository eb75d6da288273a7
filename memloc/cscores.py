"""C-scores: how regular a training example is, published for CIFAR-10 and MNIST, estimated for anything else."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memloc import sources
from memloc.datasets import Data

__all__ = ["PUBLISHED", "THRESHOLD", "consistency_scores", "estimate", "held_out_votes", "of", "undo_tfds_shuffle"]

PUBLISHED: tuple[str, ...] = ("cifar10", "mnist")
"""The data sets whose C-scores :func:`consistency_scores` reads."""

THRESHOLD = 0.5
"""An example with a lower C-score counts as memorized by its nature (Maini et al. 2023, reference code)."""

_FILES = {"cifar10": "cscores/cifar10-cscores-orig-order.npz", "mnist": "cscores/mnist-cscores.npy"}
_MNIST_CONVERTED = "cscores/mnist-cscores-orig-order.npz"
_MNIST_CONVERTED_MD5 = "1cdb97e47a9ed8324dde744bb499c766"
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_NEIGHBOURS = 100  # beyond these lies less than 3e-5 of the weight of the smallest subsets


def of(data: Data, root: str | os.PathLike[str] | None = None) -> Tensor:
    """Give the C-scores of the training examples: the published ones where there are any, else an estimate.

    Args:
        data: Any data; the first examples of a data set will do.
        root: The folder that holds the published scores; by default :func:`memloc.sources.root`.

    Returns:
        The scores under the true labels, 0 to 1. Float32, shape ``(N,)``, on the device of the data.

    Raises:
        FileNotFoundError: If the data set has published scores and they are not on this machine; the message has the
            command that gets them.
        ValueError: If the file is not the official one, or the examples are not the first of the data set.

    Example:
        >>> from memloc import datasets
        >>> scores = of(datasets.load("digits"))
        >>> (scores < THRESHOLD).sum().item()
        17
    """
    train = data.train
    if data.name not in PUBLISHED:
        return estimate(train.images, train.true_labels)
    return consistency_scores(data.name, len(train), root, labels=train.true_labels).to(train.images.device)


def consistency_scores(
    dataset: str,
    examples: int | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """Read the published C-scores of a data set's training examples.

    A C-score is the expected accuracy on an example when it is held out of the training set, averaged over the size of
    the training set: near 1 the rest of the data predicts its label, near 0 only the example itself does.

    Args:
        dataset: ``"cifar10"`` (scored by an Inception network) or ``"mnist"`` (by a perceptron).
        examples: Only the first so many training examples; None takes all.
        root: The folder that holds the data sets; by default :func:`memloc.sources.root`.
        labels: True labels of these examples, to be compared with those in the file. Int64, shape ``(N,)``. MNIST's
            published file has no labels: nothing is compared.

    Returns:
        The scores in the order of the official training set, 0 to 1. Float32, shape ``(N,)``.

    Raises:
        ValueError: If the data set has no published scores or fewer examples, a file is not the official one, or the
            labels are others.
        FileNotFoundError: If the file is not there; the message has the command that gets it.

    Source:
        Jiang et al. (2021). MNIST's scores are published in the shuffled order of tensorflow-datasets
        (:func:`undo_tfds_shuffle`); a file ``mnist-cscores-orig-order.npz``, in which that has been done, will do.
    """
    if dataset not in PUBLISHED:
        raise ValueError(
            f"dataset must be one of {', '.join(PUBLISHED)}, got {dataset!r}: "
            "for other data, memloc.cscores.estimate(images, labels) computes scores"
        )
    scores, published_labels = _read(dataset, root)
    count = len(scores) if examples is None else examples
    if not 1 <= count <= len(scores):
        raise ValueError(f"examples must be from 1 to {len(scores)}, all that {dataset} has, got {count}")
    if labels is not None and published_labels is not None:
        expected = torch.from_numpy(published_labels[:count])
        if not expected.equal(labels.cpu()):
            differ = int((expected != labels.cpu()).sum()) if expected.shape == labels.shape else "their number"
            raise ValueError(
                f"labels must be the true ones of the first {count} training images of {dataset}, in their order, "
                f"got others (differing: {differ})"
            )
    return torch.from_numpy(scores[:count]).float()


def _read(dataset: str, root: str | os.PathLike[str] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read scores, float64, and, where the file has them, labels, int64, shape ``(N,)``, in the official order."""
    folder = Path(sources.root() if root is None else root).expanduser()
    file, md5 = _FILES[dataset], None
    if dataset == "mnist" and not (folder / file).is_file() and (folder / _MNIST_CONVERTED).is_file():
        file, md5 = _MNIST_CONVERTED, _MNIST_CONVERTED_MD5
    content = io.BytesIO(sources.read_checked("cscores", file, folder, md5))
    if file.endswith(".npy"):
        return undo_tfds_shuffle(np.load(content, allow_pickle=False)), None
    with np.load(content, allow_pickle=False) as arrays:
        return arrays["scores"], arrays["labels"]


def undo_tfds_shuffle(values: np.ndarray) -> np.ndarray:
    """Bring values of training examples from the order of tensorflow-datasets into that of the official files.

    Tensorflow-datasets stores a training set sorted by the MD5 of "train" followed by the example's index.

    Args:
        values: In the order of tensorflow-datasets. Shape ``(N, …)``.

    Returns:
        The same values; the one at place ``i`` is that of training example ``i``. Shape ``(N, …)``.

    Source:
        The rule is inferred. It gives the order in which Jiang et al. publish CIFAR-10, for which they also publish
        the original order.

    Example:
        >>> undo_tfds_shuffle(np.array(["a", "b", "c", "d", "e"])).tolist()
        ['b', 'd', 'e', 'c', 'a']
    """
    hashes = [hashlib.md5(b"train%d" % index, usedforsecurity=False).digest() for index in range(len(values))]
    order = sorted(range(len(values)), key=hashes.__getitem__)
    restored = np.empty_like(values)
    restored[order] = values
    return restored


def estimate(images: Tensor, labels: Tensor, *, shares: Sequence[float] = _SHARES, batch_size: int = 1000) -> Tensor:
    """Compute the C-scores that a nearest-neighbour classifier gives, for data without published scores.

    Args:
        images: Shape ``(N, …)``; compared by Euclidean distance, pixel by pixel. At least two.
        labels: The labels whose regularity is in question. Int64, shape ``(N,)``, from 0 up.
        shares: Sizes of the training set, as fractions of the other examples, each above 0 and at most 1.
        batch_size: Images at a time.

    Returns:
        The scores, 0 to 1. Float32, shape ``(N,)``, on the device of the images.

    Raises:
        ValueError: If an argument is out of range or the shapes do not fit.

    Source:
        The definition is that of Jiang et al. (2021); they train networks on samples of 10 to 90 % of the data. The
        classifier, and expectations in place of samples, are ours: see :func:`held_out_votes`.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
        >>> estimate(points, torch.tensor([0, 0, 1, 1, 1])).round(decimals=2)  # the third lies among zeros
        tensor([0.6000, 0.6000, 0.1800, 0.8200, 0.8200])
    """
    votes = held_out_votes(images, labels, shares=shares, batch_size=batch_size)
    return votes.gather(1, labels[:, None]).squeeze(1)


def held_out_votes(
    images: Tensor, labels: Tensor, *, shares: Sequence[float] = _SHARES, batch_size: int = 1000
) -> Tensor:
    """Compute how often a nearest-neighbour classifier gives each class to an example that it was not trained on.

    The mean is over random parts of the other examples as training set, and over the size of the part. For the nearest
    neighbour that needs no sampling: where each of the others is in the part with probability ``s``, the nearest one
    that is in it is the ``j``-th nearest of all with probability ``s (1 - s)^(j - 1)``.

    Args:
        images: Shape ``(N, …)``; compared by Euclidean distance, pixel by pixel. At least two.
        labels: What the classifier is trained on. Int64, shape ``(N,)``, from 0 up.
        shares: Sizes of the part, as fractions of the other examples, each above 0 and at most 1.
        batch_size: Images at a time.

    Returns:
        Frequencies, rows sum up to 1. Float32, shape ``(N, K)``, on the device of the images.

    Raises:
        ValueError: If an argument is out of range or the shapes do not fit.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
        >>> held_out_votes(points, torch.tensor([0, 0, 1, 1, 1]))[2].round(decimals=2)
        tensor([0.8200, 0.1800])
    """
    if labels.shape != images.shape[:1] or len(images) < 2:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels must be of the same N ≥ 2 examples, got shapes {shapes}")
    if labels.is_floating_point() or labels.amin() < 0:
        raise ValueError(f"labels must be integers from 0 up, got {labels.dtype} from {labels.amin().item()}")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be fractions above 0 and up to 1, got {tuple(shares)}")
    points = images.flatten(1).float()
    depth = min(len(points) - 1, _NEIGHBOURS)
    each = torch.tensor(shares, dtype=torch.float64)[:, None]
    weights = (each * (1 - each) ** torch.arange(depth)).sum(0)
    weights = (weights / weights.sum()).float().to(points.device)
    votes = torch.zeros(len(points), int(labels.amax()) + 1, device=points.device)
    for rows in torch.arange(len(points), device=points.device).split(batch_size):
        distances = torch.cdist(points[rows], points)
        distances.scatter_(1, rows[:, None], torch.inf)  # the example itself is held out
        nearest = distances.topk(depth, largest=False).indices
        votes[rows] = votes[rows].scatter_add(1, labels[nearest], weights.expand(len(rows), -1))
    return votes
