"""Take the activations of any layers of any network, projected where they are many, within bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memloc import dropout, randomness
from memloc.evaluation import autocast
from memloc.models import channels, evaluation_mode

__all__ = ["INPUT", "features"]

INPUT = "input"
"""What the images themselves are called among the layers."""

MEMORY_BYTES = 900_000_000  # for activations, projected and not; the network's own needs come on top
COLUMNS = 1024  # of a random matrix that exist at a time


class _Reached(Exception):
    """Ends a forward pass once every layer that is wanted has been called."""


def features(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    projected: int | None = 5000,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Compute activations layer by layer, so that no more than a few layers are in memory at a time.

    Layers whose activations fit into 0.9 GB together share a forward pass, which ends behind the last of them; a
    single larger one is computed in portions of the images. Where a layer has more than ``projected`` features they are
    multiplied by a matrix of independent Gaussian numbers whose rows have unit norm, which nearly keeps angles and the
    ratios of distances. It belongs to the layer's name: the same generator gives the same matrix for other
    images and for the same network at another epoch. Its columns are drawn a few at a time.

    The network runs in evaluation mode, example-tied dropout in mode ``drop``. Between two layers that are taken from
    the stream it is as it was, bit for bit; train it only when the stream has ended.

    Args:
        model: Any network on the device of the images.
        images: As the network takes them, one a row. Shape ``(N, …)``.
        layers: Names of modules (``model.named_modules()``), or :data:`INPUT` for the images. None takes the images and
            every convolution and linear layer that is called, in the order of execution.
        projected: Most features of a layer; None keeps all.
        batch_size: Images at a time.
        generator: Of the CPU; None makes one from seed 0.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast); the projection is always computed in float32.
        channels_last: Whether to lay images of four dimensions out as NHWC.

    Returns:
        A stream of names and activations, in the order of ``layers``. An activation is what the module returned, before
        anything writes into it: that of a convolution is the one before its norm and ReLU. Flattened, float32, shape
        ``(N, min(D, projected))``, on the device of the images.

    Raises:
        ValueError: If a number is less than 1 or the precision unknown, or a layer is named twice, does not exist, is
            not called exactly once in a forward pass, or does not return a tensor with a row for each image.

    Source:
        Stephenson et al. (2021), and the reference code of their analysis: hooks on convolutions and linear layers, and
        projection of more than 5,000 features with rows of unit norm. There the whole matrix lies in memory.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        >>> for name, activations in features(model, torch.ones(3, 4), projected=5):
        ...     print(name, tuple(activations.shape))
        input (3, 4)
        0 (3, 5)
        2 (3, 2)
    """
    for name, value in (("projected", projected), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    draw = randomness.generator(0, "features") if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=draw))
    memory_format = torch.channels_last if channels_last and images.ndim == 4 else torch.contiguous_format
    reader = _Reader(model, images, batch_size, precision, memory_format)
    return _stream(reader, reader.sizes(layers), projected, seed)


def _stream(reader: "_Reader", sizes: dict[str, int], projected: int | None, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Compute group after group of layers, and give the layers of each away one by one."""
    for group in _groups(sizes, len(reader.images), projected):
        found = _activations(reader, group, projected, seed)
        for name in group:
            yield name, found.pop(name)


def _kept(size: int, projected: int | None) -> int:
    return size if projected is None else min(size, projected)


def _groups(sizes: dict[str, int], count: int, projected: int | None) -> list[dict[str, int]]:
    """Divide layers into groups that fit into memory before and after projection; one alone may be too large."""
    groups: list[dict[str, int]] = []
    left = -1
    for name, size in sizes.items():
        needed = 4 * count * (size + _kept(size, projected))
        if needed > left:
            groups.append({})
            left = MEMORY_BYTES
        groups[-1][name] = size
        left -= needed
    return groups


def _activations(reader: "_Reader", sizes: dict[str, int], projected: int | None, seed: int) -> dict[str, Tensor]:
    """Compute the activations of a group of layers, in portions of the images that fit into memory."""
    images = reader.images
    widths = {name: _kept(size, projected) for name, size in sizes.items()}
    found = {name: images.new_zeros(len(images), width, dtype=torch.float32) for name, width in widths.items()}
    rows = (MEMORY_BYTES // 4 - len(images) * sum(widths.values())) // max(1, sum(sizes.values()))
    rows = max(rows - rows % reader.batch_size, reader.batch_size)
    for start in range(0, len(images), rows):
        portion = slice(start, start + rows)
        whole = reader.read(portion, sizes)
        for name, width in widths.items():
            if width == sizes[name]:
                found[name][portion] = whole.pop(name)
            else:
                _project(whole.pop(name), found[name][portion], randomness.generator(seed, "projection", name))
    return found


def _project(activations: Tensor, out: Tensor, draw: torch.Generator) -> None:
    """Add to zeros the product with a Gaussian matrix with rows of unit norm, ``(N, D) → (N, projected)``."""
    squares = out.new_zeros(out.shape[1])
    for columns in activations.split(COLUMNS, dim=1):
        block = torch.randn(columns.shape[1], out.shape[1], generator=draw).to(out.device)
        out.addmm_(columns, block)  # in place: autocast leaves it in float32
        squares += block.square_().sum(0)
    out /= squares.sqrt_()


@dataclass(frozen=True)
class _Reader:
    """Runs a network on images and listens to its layers."""

    model: nn.Module
    images: Tensor
    batch_size: int
    precision: str
    memory_format: torch.memory_format

    def sizes(self, layers: Sequence[str] | None) -> dict[str, int]:
        """Run one image, and give the number of features of each layer, after checking that it has some."""
        known = dict(self.model.named_modules(remove_duplicate=False))
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError(f"layers must name each layer once, got {', '.join(map(repr, layers))}")
        named = list(channels(self.model)) if layers is None else [name for name in layers if name != INPUT]
        for name in named:
            if name not in known:
                raise ValueError(f"layers must name modules of the network (model.named_modules()), got {name!r}")
        calls: dict[str, list[object]] = {}
        one = self.images[:1] if len(self.images) else self.images.new_zeros(1, *self.images.shape[1:])
        with self._tapped(named, lambda name, output: calls.setdefault(name, []).append(output)):
            self.model(self._laid_out(one))
        order = [INPUT, *calls] if layers is None else layers
        if INPUT in order and INPUT in known:
            raise ValueError(
                f"layers must leave {INPUT!r} out: it stands for the images, and a module has that name too"
            )
        found = {name: _size(name, calls.get(name, [])) for name in order if name != INPUT}
        return {name: found[name] if name in found else self.images.shape[1:].numel() for name in order}

    @torch.no_grad()
    def read(self, portion: slice, sizes: dict[str, int]) -> dict[str, Tensor]:
        """Compute all activations of some layers for some images, float32 ``(N, D)``."""
        images = self.images[portion]
        found = {name: images.new_empty(len(images), size, dtype=torch.float32) for name, size in sizes.items()}
        names = [name for name in sizes if name != INPUT]
        waiting: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            if name not in waiting or not isinstance(output, Tensor):
                raise ValueError(f"layers must return one tensor in every forward pass, {name!r} does so only in some")
            if len(output) != len(waiting[name]):
                raise ValueError(
                    f"layers must return a row for each image, {name!r} gives {len(output)} for {len(waiting[name])}"
                )
            # Copied at once, because the next layer may write into it.
            waiting.pop(name).copy_(output.reshape(len(output), -1))
            if not waiting:
                raise _Reached

        if INPUT in found:
            found[INPUT].copy_(images.reshape(len(images), sizes[INPUT]))
        with self._tapped(names, keep):
            for start in range(0, len(images) if names else 0, self.batch_size):
                rows = slice(start, start + self.batch_size)
                waiting |= {name: found[name][rows] for name in names}
                with suppress(_Reached):
                    self.model(self._laid_out(images[rows]))
                for name in waiting:
                    raise ValueError(f"layers must be called in every forward pass, {name!r} is called only in some")
        return found

    def _laid_out(self, images: Tensor) -> Tensor:
        """Copy images, which the network may overwrite."""
        return images.clone(memory_format=self.memory_format)

    @contextmanager
    def _tapped(self, names: Iterable[str], tap: Callable[[str, object], object]) -> Iterator[None]:
        """Give what layers return to ``tap`` inside the block, and leave the network as it was."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        with ExitStack() as stack:
            stack.enter_context(_buffers_kept(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(randomness.seeded(0, "features"))  # some networks never stop dropping
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(dropout.examples(self.model, mode="drop"))
            stack.enter_context(autocast(self.images.device, self.precision))
            for name in names:
                stack.callback(modules[name].register_forward_hook(partial(_pass_on, tap, name)).remove)
            yield


def _pass_on(
    tap: Callable[[str, object], object], name: str, module: nn.Module, inputs: tuple[object, ...], output: object
) -> None:
    tap(name, output)


def _size(name: str, outputs: Sequence[object]) -> int:
    """Count the features of a layer that was run on one image, after checking that it has some."""
    if len(outputs) != 1:
        raise ValueError(f"layers must be called once in a forward pass, {name!r} is called {len(outputs)} times")
    output = outputs[0]
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != 1:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layers must return a tensor with a row for each image, {name!r} gives {got} for one image")
    return output.numel()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back, because some networks count or average in them in evaluation mode too."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
