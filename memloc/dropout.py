"""Example-tied dropout: channels that only some examples may use, and the dropouts it is compared with."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from memloc.randomness import derive, generator

__all__ = ["KINDS", "MODES", "ExampleTiedDropout", "FixedDropout", "Slot", "examples", "insert", "slots"]

KINDS = ("none", "tied", "tied-parity", "standard", "fixed")
"""What :func:`insert` knows: nothing, example-tied dropout (with the reference code's masks), torch's, a fixed mask."""

MODES = ("own", "all", "scaled", "drop")
"""Which memorization channels are on: each example's own, all, all times their probability, none."""


class ExampleTiedDropout(nn.Module):
    """Lets every example use the generalization channels, and memorization channels of its own.

    Of ``C`` channels the first ``int(p_gen · C)`` are generalization channels, which are always on. Each other is a
    memorization channel, on for example ``i`` with probability ``p_mem``: a fixed choice that depends on nothing but
    seed, salt, channel and ``i``. In mode

    - ``own``: memorization channels are on as the mask of each example says;
    - ``all``: all are on;
    - ``scaled``: all are on and multiplied by ``p_mem``, the mean of the masks ("test" in the reference code);
    - ``drop``: none is on, and the generalization channels are multiplied by ``rescale``.

    Mode and examples come from :func:`examples`; training and evaluation mode make no difference. Nothing is written in
    place and no global generator is used.

    Args:
        shape: Channels, or the shape of the mask of one example: ``C`` masks activations ``(B, C, …)`` by channel,
            ``(C, H, W)`` by element, ``(1, D)`` the features of tokens ``(B, T, D)``.
        count: Number of examples N, whose masks are then kept as a table of bits; None computes masks when they are
            needed, for any index.
        p_gen: Share of generalization channels, 0 to 1; with 1 the layer does nothing.
        p_mem: Probability that a memorization channel is on for an example, 0 to 1.
        seed: Decides the masks.
        salt: Decides them as well: give each layer its own, or layers share the beginnings of their masks.
        parity: Draw the masks as the reference code does, from torch's generator seeded with the index alone.
        rescale: Factor of the generalization channels in mode ``drop``; the reference code has
            ``(p_gen + p_mem) / p_gen``.

    Attributes:
        rescale: As given; may be changed.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Maini et al. (2023), section 6.2 and reference code, whose masks are the same in all layers, cost 48.6 GiB for
        ResNet-9 and seed the global generator anew for each example.

    Example:
        >>> layer = ExampleTiedDropout(10, count=3, p_gen=0.5, p_mem=0.5)
        >>> activations = torch.ones(2, 10, 4, 4)
        >>> with examples(layer, torch.tensor([2, 0])):
        ...     layer(activations).shape
        torch.Size([2, 10, 4, 4])
        >>> with examples(layer, mode="drop"):
        ...     layer(activations)[0, :, 0, 0]
        tensor([1., 1., 1., 1., 1., 0., 0., 0., 0., 0.])
    """

    masks: Tensor | None

    def __init__(
        self,
        shape: int | Sequence[int],
        count: int | None = None,
        *,
        p_gen: float = 0.2,
        p_mem: float = 0.1,
        seed: int = 0,
        salt: int = 0,
        parity: bool = False,
        rescale: float = 1.0,
    ):
        super().__init__()
        self.shape = _checked_shape(shape)
        for name, share in (("p_gen", p_gen), ("p_mem", p_mem)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a fraction from 0 to 1, got {share!r}")
        if count is not None and count < 1:
            raise ValueError(f"count must be the number of examples, at least 1, got {count!r}; None for any index")
        self.count, self.p_gen, self.p_mem, self.rescale = count, p_gen, p_mem, rescale
        self.seed, self.salt, self.parity = seed, salt, parity
        self._size = math.prod(self.shape)
        self._shared = int(p_gen * self._size)
        self._mode = "own"
        self._indices: Tensor | None = None
        self.register_buffer("masks", None if count is None else self._table(count))

    def masks_of(self, indices: Tensor) -> Tensor:
        """Give the masks of some examples: True where a channel is on.

        Args:
            indices: Positions in the training set. Int64, shape ``(B,)``.

        Returns:
            Bool, shape ``(B, *shape)``, on the device of the indices.

        Raises:
            ValueError: If the indices are of another kind, or beyond the layer's examples.
        """
        _check_indices(indices, [self])
        return self._on(indices).bool().unflatten(1, self.shape)

    def forward(self, activations: Tensor) -> Tensor:
        """Switch channels off; the result has the shape and type of the activations.

        Raises:
            RuntimeError: If nobody has said whose activations these are.
            ValueError: If there are not as many as :func:`examples` said, or they do not fit the masks.
        """
        _check_fit(self.shape, activations)
        if self._mode == "all" or self.p_gen == 1:
            return activations
        if self._mode == "own":
            factors = self._on(self._known_indices(len(activations)).to(activations.device)).to(activations.dtype)
        else:
            factors = activations.new_full((1, self._size), self.rescale if self._mode == "drop" else 1.0)
            factors[:, self._shared :] = 0.0 if self._mode == "drop" else self.p_mem
        spread = self.shape + (1,) * (activations.ndim - 1 - len(self.shape))
        return activations * factors.unflatten(1, spread)

    def extra_repr(self) -> str:
        """Say what decides the masks."""
        count = "any" if self.count is None else self.count
        return f"{self.shape}, count={count}, p_gen={self.p_gen}, p_mem={self.p_mem}, salt={self.salt}"

    def __getstate__(self) -> dict[str, object]:
        """Let a copy be outside of every block of :func:`examples`, which could not put it back."""
        return {**super().__getstate__(), "_mode": "own", "_indices": None}

    def _known_indices(self, expected: int) -> Tensor:
        if self._indices is None:
            raise RuntimeError(
                "example-tied dropout must know whose activations it sees: run the network inside "
                "`with dropout.examples(model, indices):`, or with mode='drop' for all but training examples"
            )
        if len(self._indices) != expected:
            raise ValueError(f"indices must be one per image, {expected}, got {len(self._indices)}")
        return self._indices

    def _on(self, indices: Tensor) -> Tensor:
        """Give the masks of some examples as zeros and ones, uint8, shape ``(B, size)``."""
        if self.masks is None:
            return self._draw(indices)
        packed = self.masks[indices.to(self.masks.device)]
        spread = _SPREAD.to(packed.device).take(packed.long()).view(torch.uint8)
        return spread[:, : self._size].to(indices.device)

    def _draw(self, indices: Tensor) -> Tensor:
        """Compute the masks of some examples as zeros and ones, uint8, shape ``(B, size)``."""
        on = torch.ones(len(indices), self._size, dtype=torch.uint8, device=indices.device)
        if self.parity:
            shape = (1, self._size - self._shared)
            probability = torch.full(shape, self.p_mem, dtype=torch.float32, device="cpu")
            for row, index in zip(on, indices.tolist(), strict=True):
                own = torch.Generator("cpu").manual_seed(index)
                row[self._shared :] = torch.bernoulli(probability, generator=own)[0]
        else:
            key = derive(self.seed, "masks", self.salt)
            channels = torch.arange(self._shared, self._size, device=indices.device)
            numbers = _mixed(_mixed(indices * _STEP + key)[:, None] + channels * _STEP)
            on[:, self._shared :] = _shifted(numbers, 11) < int(self.p_mem * 2**53)
        return on

    def _table(self, count: int) -> Tensor:
        """Draw the masks of all examples, eight to a byte. Uint8, shape ``(N, ⌈size / 8⌉)``."""
        parts = torch.arange(count, device="cpu").split(4096)
        rows = [np.packbits(self._draw(part).numpy(), 1, "little") for part in parts]
        return torch.from_numpy(np.concatenate(rows))


_SPREAD = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")).view(
    torch.int64
)  # the bits of every byte as eight bytes, so that one look-up spreads eight masks
_STEP = -7046029254386353131  # 2⁶⁴ divided by the golden ratio, as int64


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros, as unsigned numbers are."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(numbers: Tensor) -> Tensor:
    """Scramble int64 numbers: the finaliser of SplitMix64 (Steele et al., 2014), the same on every device."""
    numbers = (numbers ^ _shifted(numbers, 30)) * -4658895280553007687
    numbers = (numbers ^ _shifted(numbers, 27)) * -7723592293110705685
    return numbers ^ _shifted(numbers, 31)


def _checked_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"shape must be a number of channels or a shape of positive integers, got {shape!r}")
    return sizes


def _check_fit(mask: tuple[int, ...], activations: Tensor) -> None:
    shape = tuple(activations.shape)
    fits = (each in (1, size) for each, size in zip(mask, shape[1:], strict=False))
    if len(shape) <= len(mask) or not all(fits):
        raise ValueError(f"activations must have shape (B, {', '.join(map(str, mask))}, …), got {shape}")


@contextmanager
def examples(model: nn.Module, indices: Tensor | None = None, mode: str = "own") -> Iterator[None]:
    """Say whose activations go through the example-tied dropout of a network inside the block, and in which mode.

    A network without such layers is not concerned.

    Args:
        model: Any network.
        indices: Which training example each image of the batch is. Int64, shape ``(B,)``; needed for mode ``own``.
        mode: One of :data:`MODES`.

    Raises:
        ValueError: If the mode is unknown, or the indices are missing, of another kind, or beyond the layers' examples.

    Example:
        >>> layer = ExampleTiedDropout(4)
        >>> layer(torch.ones(1, 4))
        Traceback (most recent call last):
        RuntimeError: example-tied dropout must know whose activations it sees: run the network inside ...
        >>> with examples(layer, torch.tensor([0])):
        ...     layer(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    layers = [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]
    if mode == "own":
        _check_indices(indices, layers)
    before = [(layer._mode, layer._indices) for layer in layers]
    for layer in layers:
        layer._mode, layer._indices = mode, indices
    try:
        yield
    finally:
        for layer, (was, whose) in zip(layers, before, strict=True):
            layer._mode, layer._indices = was, whose


def _check_indices(indices: Tensor | None, layers: Iterable[ExampleTiedDropout]) -> None:
    if indices is None or indices.ndim != 1 or indices.dtype != torch.int64:
        got = "None" if indices is None else f"{indices.dtype} {tuple(indices.shape)}"
        raise ValueError(f"indices must be int64 (B,) for mode 'own', got {got}")
    counts = [layer.count for layer in layers if layer.count is not None]
    if len(indices) and layers and (indices.amin() < 0 or (counts and indices.amax() >= min(counts))):
        last = min(counts) - 1 if counts else "…"
        raise ValueError(f"indices must be from 0 to {last}, got {indices.amin().item()} to {indices.amax().item()}")


class FixedDropout(nn.Module):
    """Switches the same channels off for all examples, in training and evaluation: a smaller network.

    The others are divided by the share that is left, ``1 - rate``.

    Args:
        shape: Channels, or the shape of the mask, as for :class:`ExampleTiedDropout`.
        rate: Probability that a channel is off, from 0 to less than 1.
        seed: Decides which.
        salt: Decides it as well: give each layer its own.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Maini et al. (2023), "sparse" dropout, a control. The mask of their code differs between the rows of a batch, so
        that the network is none of a fixed capacity.

    Example:
        >>> layer = FixedDropout(4, rate=0.5)
        >>> bool((layer(torch.ones(2, 4))[0] == layer(torch.ones(2, 4))[1]).all())
        True
    """

    mask: Tensor

    def __init__(self, shape: int | Sequence[int], rate: float = 0.5, *, seed: int = 0, salt: int = 0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be a fraction from 0 to less than 1, got {rate!r}")
        sizes, self.rate = _checked_shape(shape), rate
        self.salt = salt
        rng = generator(seed, "fixed dropout", salt)
        self.register_buffer("mask", torch.rand(sizes, generator=rng, dtype=torch.float32, device="cpu") >= rate)

    def forward(self, activations: Tensor) -> Tensor:
        """Switch channels off; the result has the shape and type of the activations."""
        _check_fit(tuple(self.mask.shape), activations)
        spread = self.mask.unflatten(-1, (self.mask.shape[-1],) + (1,) * (activations.ndim - 1 - self.mask.ndim))
        return activations * (spread.to(activations.dtype) / (1 - self.rate))


class Slot(nn.Identity):
    """A place for dropout in a network; it does nothing until :func:`insert` puts a layer there.

    Args:
        shape: Channels, or the shape of the mask, as for :class:`ExampleTiedDropout`.
    """

    def __init__(self, shape: int | Sequence[int]):
        super().__init__()
        self.shape = _checked_shape(shape)


def slots(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """List the places for dropout in a network.

    Returns:
        Shape of the mask by module path, in the order of the network.

    Example:
        >>> slots(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Slot(8), nn.Linear(8, 2)))
        {'2': (8,)}
    """
    return {path: module.shape for path, module in model.named_modules() if isinstance(module, Slot)}


def insert(
    model: nn.Module,
    kind: str,
    *,
    places: Iterable[str] | None = None,
    count: int | None = None,
    p_gen: float = 0.2,
    p_mem: float = 0.1,
    rate: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """Put dropout into the slots of a network, in place.

    Args:
        model: A network with slots.
        kind: One of :data:`KINDS`; ``none`` leaves the network alone.
        places: Names of :func:`slots`; None takes all.
        count: Examples, for the tables of example-tied dropout; None computes its masks when they are needed.
        p_gen: Share of generalization channels of example-tied dropout.
        p_mem: Probability of its memorization channels.
        rate: Probability that an element (``standard``) or a channel (``fixed``) is off.
        seed: Decides the masks of ``tied`` and ``fixed``; each slot has its own salt, also when the slots are filled in
            several calls.

    Returns:
        The network.

    Raises:
        ValueError: If the kind or a place is unknown, or a value is out of range.

    Example:
        >>> model = insert(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Slot(8), nn.Linear(8, 2)), "standard", rate=0.1)
        >>> model[2]
        Dropout(p=0.1, inplace=False)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = slots(model)
    chosen = list(known) if places is None else list(places)
    for place in chosen:
        if place not in known:
            raise ValueError(f"places must be among {', '.join(known) or 'none'}, got {place!r}")
    if kind != "none" and not known:
        raise ValueError(f"model must have a place for dropout, {type(model).__name__.lstrip('_')} has none")
    if kind != "none" and not chosen:
        raise ValueError(f"places must be at least one of {', '.join(known)}, got none")
    masked = [module for module in model.modules() if isinstance(module, ExampleTiedDropout | FixedDropout)]
    first = 1 + max((module.salt for module in masked), default=-1)
    for salt, (place, shape) in enumerate(known.items(), first):
        if kind == "none" or place not in chosen:
            continue
        layer: nn.Module = nn.Dropout(rate)
        if kind == "fixed":
            layer = FixedDropout(shape, rate, seed=seed, salt=salt)
        elif kind != "standard":
            shares = {"p_gen": p_gen, "p_mem": p_mem}
            layer = ExampleTiedDropout(shape, count, **shares, seed=seed, salt=salt, parity=kind == "tied-parity")
        model.set_submodule(place, layer)
    return model
