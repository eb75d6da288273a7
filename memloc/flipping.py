"""Find the fewest units (channels, or single weights) whose removal flips the prediction on one example."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from memloc.datasets import Data
from memloc.evaluation import Accuracies, classes
from memloc.gates import UNITS, ZERO, Gates, Unit
from memloc.greedy import COPIED, NOISE, OBJECTIVES, Search, batch_problems, margins_of, target_problems
from memloc.models import layer_groups
from memloc.randomness import generator as make_generator

__all__ = [
    "COPIED",
    "NOISE",
    "OBJECTIVES",
    "PARITY",
    "UNITS",
    "ZERO",
    "CriticalChannels",
    "EditedAccuracies",
    "SmallestSets",
    "Unit",
    "choose_targets",
    "critical_channels",
    "edited_accuracies",
    "smallest_sets",
    "without",
]

PARITY: dict[str, Any] = {"copied": "batch", "units": "all", "skipped": 0.0}
"""The reference code's choices, for ``critical_channels(…, **PARITY)``; ``noise`` selects one of its two versions."""


@dataclass(frozen=True)
class CriticalChannels:
    """What the search found, for T targets.

    Attributes:
        targets: Their indices.
        labels: Their labels.
        units: The removed units of each, in order.
        layer_groups: The layer group of each of these units.
        margins: Of each target before the first removal and after each one: the logit of its label less the
            largest other one, of its disturbed copies.
        flipped: Whether its prediction is another than its label in the end; otherwise the search came to
            its limit, or no removal promised to help.
        zero: Where units were switched off.
    """

    targets: tuple[int, ...]
    labels: tuple[int, ...]
    units: tuple[tuple[Unit, ...], ...]
    layer_groups: tuple[tuple[str, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    flipped: tuple[bool, ...]
    zero: str

    def table(self) -> pd.DataFrame:
        """Return one row a target: ``units`` is how many were removed, margins are in logits."""
        return pd.DataFrame(
            {
                "target": self.targets,
                "label": self.labels,
                "units": [len(units) for units in self.units],
                "flipped": self.flipped,
                "margin_before": [margins[0] for margins in self.margins],
                "margin_after": [margins[-1] for margins in self.margins],
            }
        )

    def steps(self) -> pd.DataFrame:
        """Return one row a removed unit; ``step`` counts from 1, ``margin`` is what its removal left."""
        rows = [
            {"target": target, "step": step, "layer_group": group, **asdict(unit), "margin": margin}
            for target, units, groups, margins in zip(
                self.targets, self.units, self.layer_groups, self.margins, strict=True
            )
            for step, (unit, group, margin) in enumerate(zip(units, groups, margins[1:], strict=True), start=1)
        ]
        return pd.DataFrame(rows, columns=["target", "step", "layer_group", "path", "index", "margin"])


def choose_targets(noise_mask: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Draw distinct clean and distinct noisy examples from the whole training set.

    Args:
        noise_mask: Whether each example's label is wrong. Bool, shape ``(N,)``.
        each: How many of either kind; where there are fewer, all are taken.
        generator: Of the CPU.

    Returns:
        Indices, clean ones first. Int64, shape ``(T,)``, on the device of the mask.

    Raises:
        ValueError: If ``each`` is negative.

    Example:
        >>> mask = torch.tensor([False, True, False, True])
        >>> sorted(choose_targets(mask, 9, torch.Generator()).tolist())
        [0, 1, 2, 3]
    """
    if each < 0:
        raise ValueError(f"each must be at least 0, got {each}")
    kinds = [(mask.nonzero()[:, 0]).cpu() for mask in (~noise_mask, noise_mask)]
    drawn = [kind[torch.randperm(len(kind), generator=generator)[:each]] for kind in kinds]
    return torch.cat(drawn).to(noise_mask.device)


def critical_channels(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    units: str = "all",
    zero: str = "before norm",
    objective: str = "loss",
    reference: int | Tensor = 64,
    copied: str = "target",
    copies: int = 5,
    noise: str = "independent",
    noise_scale: float = 0.01,
    skipped: float = 0.05,
    max_units: int = 200,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    channels_last: bool = False,
) -> CriticalChannels:
    """Remove, for each target, one unit after the other until the prediction on it is not its label any more.

    With a reference batch of B examples j and the target i, each step removes the unit u with the largest
    S(u), which is how much J = (1/B) Σ_{j≠i} loss_j − loss_i would fall to first order: so the target's loss is raised
    while that of the others is kept low. Units are removed for good, and scores computed anew. A search ends when the
    prediction flips, when no S(u) is positive, or at ``max_units``.

    No weight is edited and no weight has a gradient: units have gates, each target its own, so that many targets share
    a pass. With ``copied="target"`` the reference batch's part of the first step, in which no unit is
    removed yet, is computed once for all targets; later, its examples run forward from the first removed unit on, and
    backward only if they matter (``skipped``).

    Args:
        model: Any network on the device of the images; it is left as it was.
        images: Training images, float32, shape ``(N, C, H, W)``.
        labels: The labels that were trained on. Int64, shape ``(N,)``.
        targets: Indices of the examples to flip, all different; None takes all.
        units: One of :data:`UNITS`.
        zero: One of :data:`ZERO`.
        objective: One of :data:`OBJECTIVES`.
        reference: Examples in the reference batch, drawn at random, or their indices.
        copied: One of :data:`COPIED`. With ``"batch"`` up to B targets share a batch that holds them.
        copies: How many noisy copies.
        noise: One of :data:`NOISE`.
        noise_scale: Norm of a noise over the norm of what it disturbs, which is an image or the whole batch.
        skipped: Share of the gradient (at the logits, sum of absolute values) whose examples need not run backward;
            0 runs all and, where the target is copied, shares and reuses nothing.
        max_units: Most units to remove for one target.
        generator: Draws the reference batch, then the noises; None makes one from seed 0.
        batch_size: Rows at a time; a network needs one for each image of its reference batch and each copy. On a CPU
            wide networks are faster with few, such as 64.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        Units by target, with margins. A target whose prediction is wrong from the start has none.

    Raises:
        ValueError: If an argument is out of range or targets repeat.

    Source:
        Maini et al. (2023), section 6.1, and the reference code in both of its versions: :data:`PARITY`. Ours: a
        convolution's bias goes with its filter; the limit; ending where no score is positive; distinct targets from the
        whole training set; as defaults, copies of the target alone, and reference examples of little weight left out.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images, labels = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> critical_channels(model, images, labels).table().shape
        (6, 6)
    """
    targets = torch.arange(len(images)) if targets is None else targets.cpu()
    _check(images, labels, targets, objective, copied, noise, copies, noise_scale, skipped, max_units, reference)
    draw = make_generator(0, "flipping") if generator is None else generator
    gates = Gates(
        model, images, units=units, zero=zero, batch_size=batch_size, precision=precision, channels_last=channels_last
    )
    _check_labels(labels, images, gates.classes)
    copying = (copies, noise, noise_scale, draw)
    make = batch_problems if copied == "batch" else target_problems
    found: list[Search] = []
    with gates.attached():
        for problem in make(images, labels, targets, reference, *copying) if len(targets) else ():
            search = Search(gates, problem, objective, noise, skipped, max_units, batch_size)
            search.run()
            found.append(search)
    return _collect(model, gates, targets, labels, found, zero)


def _check(
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    objective: str,
    copied: str,
    noise: str,
    copies: int,
    noise_scale: float,
    skipped: float,
    max_units: int,
    reference: int | Tensor,
) -> None:
    """Refuse arguments that no search can run with."""
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("copied", copied, COPIED),
        ("noise", noise, NOISE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = reference if isinstance(reference, int) else len(reference)
    for name, number, low in (
        ("copies", copies, 1), ("noise_scale", noise_scale, 0), ("max_units", max_units, 0), ("reference", size, 1),
    ):  # fmt: skip
        if number < low:
            raise ValueError(f"{name} must be at least {low}, got {number}")
    if not 0 <= skipped < 1:
        raise ValueError(f"skipped must be at least 0 and below 1, got {skipped}")
    for name, each in (("targets", targets), ("reference", reference)):
        if isinstance(each, Tensor):
            _check_indices(name, each, len(images))


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 indices of one dimension, got {indices.dtype} {tuple(indices.shape)}")
    if len(indices.unique()) < len(indices):
        raise ValueError(f"{name} must be distinct, got {len(indices.unique())} of {len(indices)}")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {int(indices.min())} to {int(indices.max())}")


def _check_labels(labels: Tensor, images: Tensor, classes: int) -> None:
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        got = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels must be int64 of shape ({len(images)},), one an image, got {got}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be from 0 to {classes - 1}, which the network has outputs for, got {got}")


def _collect(
    model: nn.Module, gates: Gates, targets: Tensor, labels: Tensor, found: Sequence[Search], zero: str
) -> CriticalChannels:
    """Put the results of all problems one behind the other, units by their names."""
    units = tuple(tuple(gates.unit(at) for at in removed) for search in found for removed in search.removed)
    groups = {path: _group(model, path) for path in {unit.path for each in units for unit in each}}
    return CriticalChannels(
        targets=tuple(targets.tolist()),
        labels=tuple(labels[targets.to(labels.device)].tolist()),
        units=units,
        layer_groups=tuple(tuple(groups[unit.path] for unit in each) for each in units),
        margins=tuple(tuple(margins) for search in found for margins in search.margins),
        flipped=tuple(flipped for search in found for flipped in search.flipped),
        zero=zero,
    )


def _group(model: nn.Module, path: str) -> str:
    """Find the layer group of a parameter, or of the module that owns it; shared ones are where they are first."""
    groups = {name: group for group, names in layer_groups(model).items() for name in names}
    if path in groups:
        return groups[path]
    module = path if path in dict(model.named_modules()) else path.rpartition(".")[0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    return groups[names[next(model.get_submodule(module).parameters())]]


def _gates_of(model: nn.Module, units: Sequence[Unit], images: Tensor, zero: str, **numerics: Any) -> Gates:
    """Make gates that know some units: entries of parameters are known to all, outputs of linear layers to channels."""
    modules = {path for path, _ in model.named_modules()}
    kind = "channels" if all(unit.path in modules for unit in units) else "all"
    return Gates(model, images, units=kind, zero=zero, **numerics)


@contextmanager
def without(
    model: nn.Module, units: Sequence[Unit], images: Tensor, *, zero: str = "before norm"
) -> Iterator[nn.Module]:
    """Let a network compute without some units inside the block.

    Its weights are not touched; afterwards it computes as before, bit for bit, also after an error. Give one block all
    units: of two, one within the other, neither knows what the other has taken.

    Args:
        model: Any network.
        units: As :func:`critical_channels` finds them.
        images: At least one image, to see in which order modules are called. Shape ``(N, C, H, W)``.
        zero: One of :data:`ZERO`.

    Raises:
        ValueError: If the network has no such unit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
        >>> image = torch.ones(1, 1, 2, 2)
        >>> with without(model, [Unit("1", channel) for channel in range(8)], image):
        ...     model(image).abs().max().item()
        0.0
    """
    gates = _gates_of(model, units, images, zero)
    with gates.removed([gates.position(unit) for unit in units]):
        yield model


@dataclass(frozen=True)
class EditedAccuracies:
    """Accuracies of a network without the critical units of each of T targets, the target itself left out.

    Attributes:
        targets: Their indices.
        before: Of the whole network, by target: the control.
        after: Of the edited networks.
    """

    targets: tuple[int, ...]
    before: tuple[Accuracies, ...]
    after: tuple[Accuracies, ...]

    def table(self) -> pd.DataFrame:
        """Return one row a target; accuracies are fractions, ``…_lost`` is the control's less the row's."""
        rows = []
        for target, before, after in zip(self.targets, self.before, self.after, strict=True):
            final, found = asdict(before), asdict(after)
            row: dict[str, Any] = {"target": target} | {f"{name}_accuracy": found[name] for name in found}
            rows.append(row | {f"{name}_lost": final[name] - found[name] for name in found})
        names = [f.name for f in fields(Accuracies)]
        columns = ["target", *(f"{name}_accuracy" for name in names), *(f"{name}_lost" for name in names)]
        return pd.DataFrame(rows, columns=columns)


def edited_accuracies(
    model: nn.Module,
    found: CriticalChannels,
    data: Data,
    *,
    examples: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 500,
    precision: str = "fp32",
    channels_last: bool = False,
) -> EditedAccuracies:
    """Measure what the removal of each target's critical units does to all other examples.

    All edited networks share one pass over the data, and each computes only what lies behind its first removed unit.

    Args:
        model: The network that was searched; it is left as it was.
        found: Units by target.
        data: Training and test examples; targets are indices of the training set.
        examples: Draw so many training and so many test examples to evaluate on; None takes all.
        generator: Draws them; None makes one from seed 0.
        batch_size: Images at a time. Activations of one batch are held in memory.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        Four accuracies a target, and those of the whole network on the same examples.

    Raises:
        ValueError: If the network has no such units, or ``examples`` is less than one.

    Source:
        Maini et al. (2023), section 6.1, on the whole training set for each target; test accuracy is ours.
    """
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be at least 1, or None for all, got {examples}")
    draw = make_generator(0, "evaluation") if generator is None else generator
    units = [unit for each in found.units for unit in each]
    numerics = {"precision": precision, "channels_last": channels_last}
    gates = _gates_of(model, units, data.train.images, found.zero, **numerics)
    removed = [[gates.position(unit) for unit in each] for each in found.units]
    predictions, samples = [], []
    with gates.attached():
        for split in (data.train, data.test):
            sample = torch.randperm(len(split), generator=draw)[:examples].to(split.labels.device)
            batches = [_edited_classes(gates, split.images[each], removed) for each in sample.split(batch_size)]
            samples.append(sample)
            predictions.append(torch.cat(batches, 1))
    before: list[Accuracies] = []
    after: list[Accuracies] = []
    for number, target in enumerate(found.targets, start=1):
        for row, kept in ((0, before), (number, after)):
            kept.append(_rest(predictions[0][row], predictions[1][row], samples[0], samples[1], data, target))
    return EditedAccuracies(found.targets, tuple(before), tuple(after))


def _edited_classes(gates: Gates, images: Tensor, removed: Sequence[Sequence[int]]) -> Tensor:
    """Predict with the whole network, row 0, and with each edited one, int64 ``(1 + T, B)``."""
    logits, calls = gates.record(images)
    edited = [gates.logits(images, [each], calls)[0] if each else logits for each in removed]
    return torch.stack([classes(each) for each in [logits, *edited]])


def _rest(train: Tensor, test: Tensor, sample: Tensor, test_sample: Tensor, data: Data, target: int) -> Accuracies:
    """Compute accuracies from the predictions on samples, without the target."""
    split, noisy = data.train, data.train.noise_mask[sample]
    fits, is_true = train == split.labels[sample], train == split.true_labels[sample]
    rest = sample != target
    shares = [fits[~noisy & rest], fits[noisy & rest], is_true[noisy & rest], test == data.test.labels[test_sample]]
    return Accuracies(*torch.stack([share.double().mean() for share in shares]).tolist())


@dataclass(frozen=True)
class SmallestSets:
    """The smallest sets of channels whose removal flips a prediction, for T targets.

    Attributes:
        targets: Their indices.
        units: A smallest set each (of several, the one with the lowest margin); None where none is small enough.
        margins: The target's margin without it; without any set, the lowest that was seen.
        largest: The size up to which all sets were tried.
    """

    targets: tuple[int, ...]
    units: tuple[tuple[Unit, ...] | None, ...]
    margins: tuple[float, ...]
    largest: int

    def table(self) -> pd.DataFrame:
        """Return one row a target; ``smallest`` is a text such as ``2`` or ``> 3``, ``at_least`` a number."""
        sizes = [self.largest + 1 if units is None else len(units) for units in self.units]
        texts = [f"> {self.largest}" if size > self.largest else str(size) for size in sizes]
        return pd.DataFrame({"target": self.targets, "smallest": texts, "at_least": sizes, "margin": self.margins})


def smallest_sets(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    largest: int = 3,
    zero: str = "before norm",
    batch_size: int = 4096,
) -> SmallestSets:
    """Find the true minimum of channels whose removal flips a prediction, by trying every set.

    What :func:`critical_channels` finds step by step, with ``copies=1, noise_scale=0``, can be no smaller than this.

    Args:
        model: A small network of at most 64 channels (43,744 sets of up to three); it is left as it was.
        images: Training images, float32, shape ``(N, C, H, W)``.
        labels: Their labels. Int64, shape ``(N,)``.
        targets: Indices of the examples to flip, all different.
        largest: Channels in the largest sets that are tried, from 1 to 3.
        zero: One of :data:`ZERO`.
        batch_size: Rows at a time, one a set and target.

    Returns:
        A smallest set a target; the empty one where the prediction is wrong already.

    Raises:
        ValueError: If the network has more than 64 channels, or an argument is out of range.

    Source:
        Ours, to see how far from the minimum the greedy search of Maini et al. (2023) ends.
    """
    if largest not in (1, 2, 3):
        raise ValueError(f"largest must be 1, 2 or 3, got {largest}")
    targets = targets.cpu()
    _check_indices("targets", targets, len(images))
    gates = Gates(model, images, zero=zero)
    if gates.count > 64:
        raise ValueError(
            f"model must have at most 64 channels to try all sets, has {gates.count}: choose a lower width"
        )
    _check_labels(labels, images, gates.classes)
    looking, known = images[targets.to(images.device)], labels[targets.to(labels.device)]
    found: list[tuple[int, ...] | None] = [None] * len(targets)
    margins = [math.inf] * len(targets)
    with gates.attached():
        for size in range(min(largest, gates.count) + 1):
            left = [t for t, each in enumerate(found) if each is None]
            if not left:
                break
            sets = list(itertools.combinations(range(gates.count), size))
            best = _lowest_margins(gates, looking[left], known[left], sets, batch_size)
            for t, margin, number, is_flipped in zip(left, *(each.tolist() for each in best), strict=True):
                margins[t] = min(margins[t], margin)
                if is_flipped:
                    found[t] = sets[number]
    units = tuple(None if each is None else tuple(gates.unit(at) for at in each) for each in found)
    return SmallestSets(tuple(targets.tolist()), units, tuple(margins), largest)


def _lowest_margins(
    gates: Gates, images: Tensor, labels: Tensor, sets: Sequence[tuple[int, ...]], batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the lowest margin of each image over sets of removed units, the number of the set, and whether it flips.

    Sets that flip come first: a margin of 0 flips where the label comes after the class that it ties with.
    """
    _, calls = gates.record(images)
    at_once = max(1, batch_size // len(images))
    margins, flips = [], []
    for start in range(0, len(sets), at_once):
        some = sets[start : start + at_once]
        logits, known = gates.logits(images, some, calls).flatten(0, 1), labels.repeat(len(some))
        margins.append(margins_of(logits, known).unflatten(0, (len(some), -1)))
        flips.append((classes(logits) != known).unflatten(0, (len(some), -1)))
    margin, flip = torch.cat(margins), torch.cat(flips)
    which = torch.where(flip | ~flip.any(0), margin, math.inf).argmin(0)
    return margin.gather(0, which[None])[0], which, flip.any(0)
