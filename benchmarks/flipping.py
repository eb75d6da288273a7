"""Time the search for critical channels beside the loop of the reference code."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def reference_units(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, tensor and partner of what holds units: a convolution's bias goes with its weight."""
    modules = dict(model.named_modules())
    for name, tensor in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        is_convolution = isinstance(modules[path], nn.Conv2d)
        if is_convolution and own_name == "bias":
            continue
        yield (path if is_convolution else name), tensor, modules[path].bias if is_convolution else None


def reference_search(
    model: nn.Module, copies: Tensor, labels: Tensor, position: int, *, noise: str, max_units: int = 200
) -> list[tuple[str, int]]:
    """Search as the reference code does: edit the weights of a copy of the network, for one target at a time.

    Args:
        model: The network, in evaluation mode; it is copied.
        copies: Disturbed copies of a batch. Shape ``(E, B, C, H, W)``.
        labels: Of the batch. Int64, shape ``(B,)``.
        position: The target's place in the batch.
        noise: ``"independent"`` averages logits, as the code's last version does; ``"accumulated"`` averages gradients
            and looks at the last copy's logits, as the version of the paper.
        max_units: Where to stop; the reference code never does.

    Returns:
        The units in the order in which they were removed.
    """
    model = copy.deepcopy(model)
    weights = torch.ones(len(labels))
    weights[position] = -len(labels)
    removed: list[tuple[str, int]] = []
    while True:
        model.zero_grad()
        logits = torch.stack([model(each) for each in copies])
        if noise == "independent":
            seen = logits.mean(0)
            objective = (weights * F.cross_entropy(seen, labels, reduction="none")).mean()
        else:
            seen = logits[-1]
            losses = [F.cross_entropy(each, labels, reduction="none") for each in logits]
            objective = sum((weights * each).mean() for each in losses) / len(logits)
        if seen[position].argmax() != labels[position] or len(removed) == max_units:
            return removed
        objective.backward()
        best, where = 0.0, None
        for name, tensor, bias in reference_units(model):
            scores = tensor.detach() * tensor.grad
            scores = scores.flatten(1).sum(1) if tensor.ndim == 4 else scores.flatten()
            if bias is not None:
                scores = scores + bias.detach() * bias.grad
            if scores.max() > best:
                best, where = scores.max().item(), (name, int(scores.argmax()), tensor, bias)
        if where is None:
            return removed
        name, index, tensor, bias = where
        with torch.no_grad():
            if tensor.ndim == 4:
                tensor[index] = 0
            else:
                tensor.view(-1)[index] = 0
            if bias is not None:
                bias[index] = 0
        removed.append((name, index))
