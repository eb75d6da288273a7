"""Rewind a layer group to an earlier checkpoint, train nothing, and see what the network has lost."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from memloc.datasets import Data
from memloc.evaluation import Accuracies, accuracies, autocast, classes
from memloc.models import evaluation_mode, layer_groups
from memloc.replay import Calls

__all__ = ["BATCH_NORM", "Rewinding", "last_groups", "rewind", "rewind_sweep"]

BATCH_NORM = ("keep", "rewind", "recalibrate")
"""What happens to the running statistics of batch-norm; they stay those of the final network (as in the reference
code), go back with the layer group, or are computed anew from training images with the rewound weights."""


@contextmanager
def rewind(
    model: nn.Module,
    earlier: Mapping[str, Tensor],
    groups: str | Iterable[str],
    *,
    batch_norm: str = "keep",
    images: Tensor | None = None,
    batch_size: int = 1000,
) -> Iterator[None]:
    """Give layer groups of a network the weights of an earlier checkpoint inside the block.

    Afterwards every parameter and buffer is as before, bit for bit, also after an error.

    Args:
        model: Any network, with its final weights.
        earlier: State dict of the same network at an earlier epoch.
        groups: One or more names of :func:`memloc.models.layer_groups`.
        batch_norm: One of :data:`BATCH_NORM`.
        images: Training images for ``"recalibrate"``. Shape ``(N, C, H, W)``.
        batch_size: Images at a time for ``"recalibrate"``.

    Raises:
        ValueError: If a group is unknown, ``earlier`` does not fit the network, or images are missing.

    Source:
        Maini et al. (2023), layer rewinding, whose reference code keeps the final batch-norm statistics; the two other
        treatments are ours.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> initial = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        >>> with rewind(model, initial, "1"):
        ...     model(torch.ones(1, 1)).item()
        0.0
    """
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}")
    if batch_norm == "recalibrate" and (images is None or len(images) == 0):
        raise ValueError("batch_norm='recalibrate' needs images= to compute the statistics from, got none")
    changed = _changed_names(model, groups, with_buffers=batch_norm == "rewind")
    state = _tensors(model)
    for name in changed:
        if name not in earlier or earlier[name].shape != state[name].shape:
            got = tuple(earlier[name].shape) if name in earlier else "nothing"
            raise ValueError(f"earlier must hold {name} of shape {tuple(state[name].shape)}, got {got}")
    saved = {name: value.clone() for name, value in state.items()}
    try:
        with torch.no_grad():
            for name in changed:
                state[name].copy_(earlier[name])
        torch.clear_autocast_cache()  # an autocast around this block may hold the weights cast already
        if batch_norm == "recalibrate" and images is not None:
            _recalibrate(model, images, batch_size)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                state[name].copy_(value)
        torch.clear_autocast_cache()


def _changed_names(model: nn.Module, groups: str | Iterable[str], *, with_buffers: bool) -> list[str]:
    """List the parameters of some layer groups and, on demand, the buffers that go with them.

    The buffers of a module without parameters, such as a batch-norm without weights, go with what comes before it.
    """
    known = layer_groups(model)
    chosen = [groups] if isinstance(groups, str) else list(groups)
    for group in chosen:
        if group not in known:
            raise ValueError(f"groups must be among {', '.join(known)}, got {group!r}")
    changed = [name for group in chosen for name in known[group]]
    if not with_buffers:
        return changed
    parameters, kept = set(changed), model.state_dict()
    is_inside = next((name for name, _ in model.named_parameters()), None) in parameters
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(path, recurse=False)]
        if own:
            is_inside = not parameters.isdisjoint(own)
        if is_inside:
            changed += [name for name, _ in module.named_buffers(path, recurse=False) if name in kept]
    return changed


def _recalibrate(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Replace the running statistics of every batch-norm by their mean over batches of the images."""
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    try:
        with torch.no_grad(), evaluation_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean, in which every batch counts the same
                norm.train()
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum


def last_groups(model: nn.Module) -> dict[str, list[str]]:
    """Name the last k layer groups of a network for every k, for :func:`rewind_sweep`.

    Args:
        model: Any network.

    Returns:
        ``{"last 1": […], "last 2": […], …}``; the last entry is the whole network.

    Source:
        Stephenson et al. (2021), who roll back all layers from one to the output.

    Example:
        >>> last_groups(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
        {'last 1': ['1'], 'last 2': ['0', '1']}
    """
    names = list(layer_groups(model))
    return {f"last {k}": names[-k:] for k in range(1, len(names) + 1)}


@dataclass(frozen=True)
class Rewinding:
    """Accuracies of a network with one or more layer groups rewound, for L choices of groups and T epochs.

    Attributes:
        groups: Names of the choices, length L.
        epochs: Epochs rewound to, length T.
        batch_norm: Treatment of the batch-norm statistics.
        accuracies: By choice and epoch, L × T.
        final: Of the network as it is (under ``"recalibrate"``: with statistics computed anew): the control.
    """

    groups: tuple[str, ...]
    epochs: tuple[int, ...]
    batch_norm: str
    accuracies: tuple[tuple[Accuracies, ...], ...]
    final: Accuracies

    def table(self) -> pd.DataFrame:
        """Return one row a choice and epoch; accuracies are fractions, ``…_lost`` is the control's less the row's."""
        final = asdict(self.final)
        rows = []
        for group, by_epoch in zip(self.groups, self.accuracies, strict=True):
            for epoch, found in zip(self.epochs, by_epoch, strict=True):
                row: dict[str, Any] = {"batch_norm": self.batch_norm, "layer_group": group, "epoch": epoch}
                row |= {f"{name}_accuracy": value for name, value in asdict(found).items()}
                rows.append(row | {f"{name}_lost": final[name] - value for name, value in asdict(found).items()})
        return pd.DataFrame(rows)


def rewind_sweep(
    model: nn.Module,
    checkpoints: Mapping[int, Mapping[str, Tensor]],
    data: Data,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    batch_norm: str = "keep",
    calibration: int = 2000,
    batch_size: int = 500,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Rewinding:
    """Rewind every layer group to every checkpoint and measure the four accuracies each time.

    All rewound networks share one pass over the data, and each computes only what lies behind its first rewound layer:
    what lies before is the final network's, computed once a batch. (On the first batch this is checked against the
    whole network, bit for bit; a network that does not allow it is evaluated whole.)

    Args:
        model: Any network, with its final weights, on the device of the data; it is left as it was.
        checkpoints: State dicts by epoch.
        data: Training and test examples.
        groups: Names of layer groups by the name of each choice; None takes every layer group alone.
        batch_norm: One of :data:`BATCH_NORM`.
        calibration: Under ``"recalibrate"``, the first so many training images give the statistics.
        batch_size: Images at a time. Activations of one batch are held in memory.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        Accuracies by choice and epoch, and the control.

    Raises:
        ValueError: If there is no checkpoint, a group is unknown, or a checkpoint does not fit the network.

    Source:
        Maini et al. (2023), layer rewinding; test and restored accuracy are ours.
    """
    if not isinstance(checkpoints, Mapping) or not checkpoints:
        raise ValueError(f"checkpoints must map at least one epoch to a state dict, got {type(checkpoints).__name__}")
    if not isinstance(groups, Mapping | None):
        raise ValueError(f"groups must map names to lists of layer groups, got {type(groups).__name__}")
    chosen = {name: [name] for name in layer_groups(model)} if groups is None else groups
    images = data.train.images[:calibration]
    tensors = _tensors(model)

    def edited(earlier: Mapping[str, Tensor], groups: Sequence[str], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with rewind(model, earlier, groups, batch_norm=batch_norm, images=images, batch_size=batch_size):
            return {name: value.clone() for name, value in tensors.items() if not value.equal(base[name])}

    own = {name: value.clone() for name, value in tensors.items()}
    final = edited({}, [], own)  # nothing, unless the statistics are computed anew
    edits = [edited(state, group, own | final) for group in chosen.values() for state in checkpoints.values()]
    forward = _SharedForward(model, final, edits, precision, channels_last)
    train, test = (
        torch.cat([forward(batch) for batch in split.images.split(batch_size)], dim=1)
        for split in (data.train, data.test)
    )
    control, *found = (accuracies(a, data.train, b, data.test) for a, b in zip(train, test, strict=True))
    width = len(checkpoints)
    by_group = tuple(tuple(found[start : start + width]) for start in range(0, len(found), width))
    return Rewinding(tuple(chosen), tuple(checkpoints), batch_norm, by_group, control)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each once even if it is shared."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


class _SharedForward:
    """Predictions of a network and of edited copies of it, which share what lies before the first edited layer.

    Args:
        model: Any network.
        final: Parameters and buffers in which the network to predict with differs from its own state.
        edits: Those in which each copy differs from that network, by name.
        precision: For autocast.
        channels_last: Whether to lay the images out as NHWC.
    """

    def __init__(
        self,
        model: nn.Module,
        final: dict[str, Tensor],
        edits: list[dict[str, Tensor]],
        precision: str,
        channels_last: bool,
    ):
        self._model, self._final, self._edits, self._precision = model, final, edits, precision
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._can_share: bool | None = None  # not known before the first batch

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the predicted classes, int64, shape ``(1 + copies, B)``; row 0 is the network itself."""
        images = images.contiguous(memory_format=self._memory_format)
        not_inference = torch.inference_mode(False)  # whose tensors do not count what is written into them
        with (
            not_inference,
            torch.no_grad(),
            evaluation_mode(self._model),
            autocast(images.device, self._precision),
        ):
            calls = Calls(self._model)
            with calls.recorded():
                logits = [self._run(images, {})]
            if self._can_share is None:
                whole = [self._run(images, edit) for edit in self._edits]
                shared = [self._run_behind(calls, images, edit) for edit in self._edits]
                self._can_share = all(a.equal(b) for a, b in zip(whole, shared, strict=True))
                logits += whole
            elif self._can_share:
                logits += [self._run_behind(calls, images, edit) for edit in self._edits]
            else:
                logits += [self._run(images, edit) for edit in self._edits]
        return torch.stack([classes(each) for each in logits])

    def _run(self, images: Tensor, edit: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self._model, self._final | edit, (images,))

    def _run_behind(self, calls: Calls, images: Tensor, edit: dict[str, Tensor]) -> Tensor:
        edited = {id(tensor) for name, tensor in _tensors(self._model).items() if name in edit}
        owners = [module for module in self._model.modules() if edited & {id(t) for t in _own_tensors(module)}]
        with calls.replayed(before=calls.start(owners)):
            return self._run(images, edit)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
