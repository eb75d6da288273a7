"""What a network predicts, and how often it is right on clean, noisy, restored and test examples."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc import dropout, parallel
from memloc.datasets import Data, Split
from memloc.models import evaluation_mode

__all__ = ["PRECISIONS", "Accuracies", "Evaluation", "accuracies", "classes", "evaluate", "predict"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Accuracies:
    """Shares of examples that are right, each a fraction from 0 to 1; NaN where there are no such examples.

    Attributes:
        clean: Clean training examples, against their labels.
        noisy: Noisy training examples, against the labels they were given: memorization.
        restored: Noisy training examples, against their true labels.
        test: Test examples.
    """

    clean: float
    noisy: float
    restored: float
    test: float


@dataclass(frozen=True)
class Evaluation:
    """A network in evaluation mode on all the data.

    Attributes:
        loss: Mean cross-entropy on the training set, in nats.
        accuracies: Shares of examples that are right.
        predictions: Predicted class of each training example. Int64, shape ``(N,)``.
    """

    loss: float
    accuracies: Accuracies
    predictions: Tensor


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Run convolutions and matrix products in a lower precision inside the block; ``"fp32"`` changes nothing."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def predict(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int = 1000,
    precision: str = "fp32",
    channels_last: bool = False,
    mode: str = "drop",
    indices: Tensor | None = None,
) -> Tensor:
    """Compute the logits of a network in evaluation mode.

    Args:
        model: Any network on the device of the images; each module's mode is as before afterwards.
        images: Float32, shape ``(N, C, H, W)``.
        batch_size: Images at a time.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC, which is faster for convolutions.
        mode: Which channels example-tied dropout leaves on, one of :data:`memloc.dropout.MODES`.
        indices: For mode ``own``, whose mask each image gets. Int64, shape ``(N,)``; None means that they are the
            training examples in their order.

    Returns:
        Logits, float32, shape ``(N, K)``.

    Raises:
        ValueError: If there is not an index for each image, or the mode or the precision is unknown.

    Example:
        >>> predict(nn.Flatten(), torch.ones(3, 1, 1, 2)).shape
        torch.Size([3, 2])
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    whose = torch.arange(len(images), device=images.device) if indices is None else indices
    if len(whose) != len(images):
        raise ValueError(f"indices must be one per image, {len(images)}, got {len(whose)}")
    logits = []
    with torch.no_grad(), evaluation_mode(model), autocast(images.device, precision):
        for batch, own in zip(images.split(batch_size), whose.split(batch_size), strict=True):
            with dropout.examples(model, own, mode):
                # Copied, because a network may write into its images.
                logits.append(model(batch.clone(memory_format=memory_format)).float())
    return torch.cat(logits)


def _predict_together(model: nn.Module, images: Tensor, **how: Any) -> Tensor:
    """Compute what :func:`predict` does for all training or test examples, each process for its share of them."""
    if len(images) < parallel.size():  # a network may not take a share without an image
        return predict(model, images, **how)
    own = parallel.share(torch.arange(len(images), device=images.device))
    return parallel.gathered(predict(model, parallel.share(images), indices=own, **how), len(images))


def classes(logits: Tensor) -> Tensor:
    """Take the class with the largest logit; −1, which is never right, where a logit is NaN.

    Args:
        logits: Shape ``(…, K)``.

    Returns:
        Int64, shape ``(…)``.

    Example:
        >>> classes(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
        tensor([ 1, -1])
    """
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def accuracies(train_predictions: Tensor, train: Split, test_predictions: Tensor, test: Split) -> Accuracies:
    """Compute the four accuracies from predicted classes.

    Args:
        train_predictions: Int64, shape ``(N,)``.
        train: The training examples.
        test_predictions: Int64, shape ``(M,)``.
        test: The test examples.

    Returns:
        Four fractions.
    """
    noisy = train.noise_mask
    fits, is_true = train_predictions == train.labels, train_predictions == train.true_labels
    shares = [fits[~noisy], fits[noisy], is_true[noisy], test_predictions == test.labels]
    return Accuracies(*torch.stack([share.double().mean() for share in shares]).tolist())


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 1000,
    precision: str = "fp32",
    channels_last: bool = False,
    mode: str = "own",
    together: bool = False,
) -> Evaluation:
    """Evaluate a network on the training set, against given and true labels, and on the test set.

    Args:
        model: Any network on the device of the data.
        data: Training and test examples.
        batch_size: Images at a time.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.
        mode: Which channels example-tied dropout leaves on, one of :data:`memloc.dropout.MODES`. Test examples have no
            channels of their own: in mode ``own`` they are evaluated in mode ``drop``.
        together: Whether each process of a group (:mod:`memloc.parallel`) predicts for its share of the examples; all
            of them must then call this with the same network and data, and all get the same result.

    Returns:
        Loss, accuracies and predictions.
    """
    modes = (mode, "drop" if mode == "own" else mode)
    compute = _predict_together if together else predict
    logits, test_logits = (
        compute(model, split.images, batch_size=batch_size, precision=precision, channels_last=channels_last, mode=each)
        for split, each in zip((data.train, data.test), modes, strict=True)
    )
    predictions = classes(logits)
    return Evaluation(
        loss=F.cross_entropy(logits, data.train.labels).item(),
        accuracies=accuracies(predictions, data.train, classes(test_logits), data.test),
        predictions=predictions,
    )
