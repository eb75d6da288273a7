"""What decides a training: data, noise, network and settings, and the address that follows from them."""

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from memloc import datasets, fairdropout, labelnoise, models, runs, spurious_images
from memloc.evaluation import PRECISIONS

__all__ = ["LOSSES", "SCHEDULES", "VERSION", "Recipe", "Settings", "learning_rate"]

VERSION = 1
"""Part of every run's address, raised whenever the same recipe would give other weights."""

SCHEDULES = ("cosine", "triangle")

LOSSES = ("cross_entropy", "xrm", "mat")
"""What a recipe can train by: cross-entropy, cross-risk minimization of two networks, memorization-aware training."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is trained: stochastic gradient descent with momentum.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        learning_rate: Its peak.
        schedule: ``"cosine"`` (linear warm-up over the first tenth, then cosine to 0) or ``"triangle"`` (linear to
            the peak over the first 10 epochs, or 40 % of a shorter training than 25, then linear to 0).
        momentum: Of the optimiser.
        weight_decay: Of the optimiser, on all parameters.
        augment: Whether to crop and flip the training images.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``.
        channels_last: Whether to lay images and weights out as NHWC.
        compile: Whether to compile the network.
        seed: Seed of the order of the examples, the augmentation and the network's own dropout.
        processes: How many train the network together (:mod:`memloc.parallel`), each on its share of every batch. The
            step is that of one process, but for rounding, batch-norm, which takes the statistics of a share (and the
            running ones of the first), and random numbers that the network draws itself, other ones in each process.

    Raises:
        ValueError: If a value is out of range; the message names it.

    Source:
        Maini et al. (2023), reference code: batch 512, momentum 0.9, weight decay 5e-4, both schedules.
    """

    epochs: int = 50
    batch_size: int = 512
    learning_rate: float = 0.01
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = False
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        _check_at_least("epochs", self.epochs, 0)
        _check_at_least("batch_size", self.batch_size, 1)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("precision", self.precision, PRECISIONS)
        _check_at_least("seed", self.seed, 0)
        _check_at_least("processes", self.processes, 1)
        for name in ("augment", "channels_last", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            self._take_number(name, "a finite number ≥ 0", sys.float_info.max)

    def _take_number(self, name: str, expected: str, most: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{name} must be {expected}, got {value!r}")
        object.__setattr__(self, name, float(value))  # 1 and 1.0 are one recipe and must have one address


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """All that decides a training: data, noise, network and settings. Its hash is the run's address.

    Attributes:
        dataset: One of :data:`memloc.sources.NAMES`.
        attribute: What goes along with the label without being its reason: one of
            :data:`memloc.spurious_images.ATTRIBUTES`, or ``"none"``. With one, the data are grouped and of two classes,
            digits from 5 and below 5.
        correlation: Share of the training examples whose attribute is the label, on photographs.
        opacity: Of the digits on photographs, above 0.
        size: Height and width to which the images are resized; None leaves them (digits with an attribute are then of
            14 pixels in colour and 32 on photographs).
        examples: The first so many training examples; None takes all.
        noise: One of :data:`memloc.labelnoise.KINDS`.
        noise_rate: Share of the training labels that are replaced. The group of an example is that of the label it is
            trained on. Coloured digits allow none: a share of their labels is wrong already, and noise starts from the
            true ones.
        model: One of :data:`memloc.models.NAMES`.
        width: Scale of the network; None takes the network's own default.
        dropout: One of :data:`memloc.fairdropout.KINDS`.
        dropout_places: Where it is, names of :func:`memloc.dropout.slots` with commas between them; ``"all"`` for all.
        p_gen: Share of generalization channels of example-tied dropout.
        p_mem: Probability of its memorization channels, or their share for each example with ``"fair"``.
        dropout_rate: Probability of the other dropouts to switch something off.
        loss: One of :data:`LOSSES`. With ``"xrm"`` the run is of a :class:`memloc.pairs.Pair` of such networks; with
            ``"mat"`` it is of one network, and takes the held-out predictions of the pair of the same recipe, which is
            trained first and kept as a run of its own (:attr:`pair`).
        temperature: Of held-out predictions with ``"mat"``, above 0 (:func:`memloc.mat.logit_shift`).
        label_smoothing: Share of each label that is spread evenly over all classes, with ``"cross_entropy"``.

    Example:
        >>> Recipe(dataset="cifar10", model="resnet9", seed=4).address
        '...'
    """

    dataset: str = "digits"
    attribute: str = "none"
    correlation: float = 0.95
    opacity: float = 1.0
    size: int | None = None
    examples: int | None = None
    noise: str = "flip"
    noise_rate: float = 0.1
    model: str = "small_cnn"
    width: int | None = None
    dropout: str = "none"
    dropout_places: str = "all"
    p_gen: float = 0.2
    p_mem: float = 0.1
    dropout_rate: float = 0.5
    loss: str = "cross_entropy"
    temperature: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("dataset", self.dataset, datasets.NAMES)
        check_one_of("noise", self.noise, labelnoise.KINDS)
        check_one_of("model", self.model, models.NAMES)
        check_one_of("dropout", self.dropout, fairdropout.KINDS)
        check_one_of("attribute", self.attribute, ("none", *spurious_images.ATTRIBUTES))
        if not isinstance(self.dropout_places, str):
            raise ValueError(f"dropout_places must be a text such as 'all', got {self.dropout_places!r}")
        for name in ("size", "examples", "width"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        for name in ("noise_rate", "p_gen", "p_mem", "dropout_rate", "correlation", "opacity", "label_smoothing"):
            self._take_number(name, "a fraction from 0 to 1", 1.0)
        check_one_of("loss", self.loss, LOSSES)
        self._take_number("temperature", "a finite number above 0", sys.float_info.max)
        if self.temperature == 0:
            raise ValueError("temperature must be a finite number above 0, got 0.0")
        if self.loss == "xrm" and self.processes > 1:
            raise ValueError(f"processes must be 1 for loss 'xrm', which weighs whole batches, got {self.processes}")
        if self.label_smoothing and self.loss != "cross_entropy":
            got = f"{self.label_smoothing} with {self.loss!r}"
            raise ValueError(f"label_smoothing must be 0 for any loss but 'cross_entropy', got {got}")
        if self.attribute == "colour" and (self.noise_rate or self.noise != "flip"):
            got = f"{self.noise_rate} and {self.noise!r}"
            raise ValueError(
                f"noise_rate must be 0 and noise 'flip' for coloured digits, whose labels are noisy already, got {got}"
            )

    @property
    def address(self) -> str:
        """The name under which :func:`memloc.training.fit` keeps the run."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return runs.address(chosen, VERSION)

    @property
    def pair(self) -> "Recipe":
        """The recipe of the pair whose held-out predictions ``loss="mat"`` takes; all temperatures share it.

        It is one for a single process, however many train the network itself: fit it before you start them.

        Example:
            >>> Recipe(loss="mat", seed=3, temperature=0.01).pair == Recipe(loss="xrm", seed=3)
            True
        """
        return replace(self, loss="xrm", temperature=Recipe.temperature, label_smoothing=0.0, processes=1)


def _check_at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")


def check_one_of(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def learning_rate(settings: Settings, done: float) -> float:
    """Compute the learning rate at a moment of a training.

    Args:
        settings: Peak, schedule and number of epochs.
        done: Share of the training that is over, from 0 to 1. :func:`memloc.training.train` takes the middle of each
            step, so no step has a rate of zero.

    Returns:
        The learning rate.

    Source:
        Maini et al. (2023), reference code.

    Example:
        >>> [round(learning_rate(Settings(learning_rate=0.1), done), 3) for done in (0, 0.05, 0.1, 0.55, 1)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    warm_up = 0.1 if settings.schedule == "cosine" else min(10 / settings.epochs, 0.4)
    if done < warm_up:
        return settings.learning_rate * done / warm_up
    left = (1 - done) / (1 - warm_up)
    return settings.learning_rate * (left if settings.schedule == "triangle" else (1 - math.cos(math.pi * left)) / 2)
