"""The networks of the papers, and the layer groups and channels of any network."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from memloc import dropout, randomness
from memloc.dropout import Slot
from memloc.resnet18 import ResNet18
from memloc.resnet50 import ResNet50
from memloc.vgg import vgg16
from memloc.vit import SmallViT

__all__ = [
    "NAMES",
    "ResNet9",
    "build",
    "channels",
    "check_images",
    "evaluation_mode",
    "layer_groups",
    "mlp",
    "resnet9",
    "resnet18",
    "resnet50",
    "small_cnn",
    "vgg16",
    "vit_small",
]


def _conv_block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Build a convolution without bias, a batch-norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _GroupedByBlock(nn.Module):
    """A network whose layer groups are its direct children."""

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the parameters of each child that has some, in order."""
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            groups.setdefault(name.partition(".")[0], []).append(name)
        return groups


class ResNet9(_GroupedByBlock):
    """The nine-layer residual network of Maini et al.

    Eight blocks of convolution, batch-norm and ReLU and a linear layer without bias whose logits are multiplied
    by 0.2. Two residual sums (around blocks 2–3 and 5–6) have no ReLU after them. Its nine layer groups are
    ``conv0`` … ``conv7``, three tensors each, and ``linear``. Its six places for dropout are ``after.conv0``,
    ``after.conv1``, ``after.sum1``, ``after.conv4`` (before the pooling), ``after.sum2`` and ``after.conv7``.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Channels of the first block; the paper's network has 64, and all others scale with it.

    Source:
        Maini et al. (2023), main model: 2,274,880 parameters for three colours, 2,273,728 for one.

    Example:
        >>> sum(p.numel() for p in ResNet9(3, 10, 64).parameters())
        2274880
    """

    def __init__(self, in_channels: int, num_classes: int, width: int):
        super().__init__()
        w = width
        self.conv0 = _conv_block(in_channels, w)
        self.conv1 = _conv_block(w, 2 * w, kernel=5, stride=2, padding=2)
        self.conv2 = _conv_block(2 * w, 2 * w)
        self.conv3 = _conv_block(2 * w, 2 * w)
        self.conv4 = _conv_block(2 * w, 4 * w)
        self.conv5 = _conv_block(4 * w, 4 * w)
        self.conv6 = _conv_block(4 * w, 4 * w)
        self.conv7 = _conv_block(4 * w, 2 * w, padding=0)
        self.linear = nn.Linear(2 * w, num_classes, bias=False)
        after = {"conv0": w, "conv1": 2 * w, "sum1": 2 * w, "conv4": 4 * w, "sum2": 4 * w, "conv7": 2 * w}
        self.after = nn.ModuleDict({place: Slot(channels) for place, channels in after.items()})

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, shape ``(B, K)``, of images of shape ``(B, C, H, W)`` with H, W ≥ 11."""
        x = self.after["conv0"](self.conv0(images))
        x = self.after["conv1"](self.conv1(x))
        x = self.after["sum1"](x + self.conv3(self.conv2(x)))
        x = F.max_pool2d(self.after["conv4"](self.conv4(x)), 2)
        x = self.after["sum2"](x + self.conv6(self.conv5(x)))
        x = F.adaptive_max_pool2d(self.after["conv7"](self.conv7(x)), 1).flatten(1)
        return 0.2 * self.linear(x)


class _SmallCNN(_GroupedByBlock, nn.Sequential):
    """Blocks one after the other; each is a layer group."""


def resnet9(in_channels: int = 3, num_classes: int = 10, width: int = 64) -> ResNet9:
    """Build the paper's ResNet-9 with weights from torch's global generator; see :class:`ResNet9`."""
    return ResNet9(in_channels, num_classes, width)


def resnet18(in_channels: int = 3, num_classes: int = 10, width: int = 64) -> ResNet18:
    """Build a ResNet-18 with weights from torch's global generator; see :class:`memloc.resnet18.ResNet18`."""
    return ResNet18(in_channels, num_classes, width)


def resnet50(in_channels: int = 3, num_classes: int = 10, width: int = 64) -> ResNet50:
    """Build a ResNet-50 with weights from torch's global generator; see :class:`memloc.resnet50.ResNet50`."""
    return ResNet50(in_channels, num_classes, width)


def vit_small(in_channels: int = 3, num_classes: int = 10, width: int = 512, size: int = 32) -> SmallViT:
    """Build the paper's transformer with weights from torch's global generator; see :class:`memloc.vit.SmallViT`."""
    return SmallViT(in_channels, num_classes, width, size)


def small_cnn(in_channels: int = 1, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Build a five-layer convolutional network for images of 8×8 pixels and more.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Channels of the first convolution; the later ones have two, two and four times as many.

    Returns:
        The network; its layer groups are ``conv0`` … ``conv3`` and ``linear``, its places for dropout ``after0`` …
        ``after3``.

    Source:
        Ours: a small network with batch-norm that memorizes wrong labels of digits within seconds.

    Example:
        >>> small_cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    w = width
    return _SmallCNN(
        OrderedDict(
            conv0=_conv_block(in_channels, w),
            after0=Slot(w),
            conv1=_conv_block(w, 2 * w, stride=2),
            after1=Slot(2 * w),
            conv2=_conv_block(2 * w, 2 * w),
            after2=Slot(2 * w),
            conv3=_conv_block(2 * w, 4 * w, stride=2),
            after3=Slot(4 * w),
            pool=nn.AdaptiveMaxPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(4 * w, num_classes),
        )
    )


def mlp(in_features: int, num_classes: int = 10, width: int = 128) -> nn.Sequential:
    """Build a multi-layer perceptron with two hidden layers of ``width`` units and ReLU.

    Args:
        in_features: Values of one image, C·H·W.
        num_classes: Classes.
        width: Units of each hidden layer.

    Returns:
        The network; its layer groups are ``linear0``, ``linear1`` and ``linear2``, its places for dropout ``after0``
        and ``after1``.

    Example:
        >>> list(layer_groups(mlp(64)))
        ['linear0', 'linear1', 'linear2']
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear0=nn.Linear(in_features, width),
            relu0=nn.ReLU(),
            after0=Slot(width),
            linear1=nn.Linear(width, width),
            relu1=nn.ReLU(),
            after1=Slot(width),
            linear2=nn.Linear(width, num_classes),
        )
    )


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "mlp": mlp,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit_small": vit_small,
    "vgg16": vgg16,
}
NAMES = tuple(_BUILDERS)
"""The networks that :func:`build` knows."""


def build(
    name: str, *, in_channels: int, size: int, num_classes: int, width: int | None = None, seed: int
) -> nn.Module:
    """Build a network by name, with weights that depend on the seed alone.

    Args:
        name: One of :data:`NAMES`.
        in_channels: Colours of the images.
        size: Height and width of the images in pixels.
        num_classes: Classes.
        width: Scale of the network; None takes the default of the network's own function.
        seed: Seed of the initial weights.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        ValueError: If the name is unknown, or the network cannot have this width or take images of this size.

    Example:
        >>> model = build("small_cnn", in_channels=1, size=8, num_classes=10, seed=0)
    """
    if name not in _BUILDERS:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}")
    arguments = {"in_features": in_channels * size**2} if name == "mlp" else {"in_channels": in_channels}
    if name in ("vit_small", "vgg16"):
        arguments["size"] = size
    if width is not None:
        arguments["width"] = width
    with randomness.seeded(seed, "init"):
        model = _BUILDERS[name](num_classes=num_classes, **arguments)
    check_images(model, torch.zeros(1, in_channels, size, size))
    return model


def check_images(model: nn.Module, images: Tensor, num_classes: int | None = None) -> None:
    """Refuse, in one line, images that a network cannot take.

    Args:
        model: Any network.
        images: A batch; one image of it is tried. Shape ``(B, C, H, W)``.
        num_classes: Classes of the data; None lets any number pass.

    Raises:
        ValueError: If the network fails on them, or gives anything but logits of shape ``(1, K)``
            with K at least the number of classes.

    Example:
        >>> check_images(resnet9(), torch.zeros(1, 3, 8, 8))
        Traceback (most recent call last):
        ValueError: images of shape (3, 8, 8) do not fit ResNet9 (...): choose another size= or another model
    """
    shape, name = tuple(images.shape[1:]), type(model).__name__.lstrip("_")
    try:
        with (
            torch.no_grad(),
            randomness.seeded(0, "trial"),
            evaluation_mode(model),
            dropout.examples(model, mode="all"),
        ):
            logits = model(images[:1])
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # torchvision's ViT asserts
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise ValueError(
            f"images of shape {shape} do not fit {name} ({reason}): choose another size= or another model"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model {name} must give logits of shape (B, K), got {got} for one image")
    if logits.shape[1] < (num_classes or 0):
        raise ValueError(f"model {name} must have an output for each of {num_classes} classes, has {logits.shape[1]}")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode inside the block, and every module back in its own mode afterwards.

    Args:
        model: Any network.

    Example:
        >>> model = small_cnn()
        >>> with evaluation_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Divide the parameters of any network into named layer groups, each parameter in exactly one.

    A network may declare its own groups with a method ``layer_groups()``. Otherwise each weight layer (a module
    that owns a parameter of two or more dimensions with "weight" in its name, unless it is a norm) opens a group
    that is named after it, and what follows in the order of ``model.named_parameters()`` joins it: its bias, the
    norm behind it, free parameters. What comes before the first weight layer joins the first group.

    Args:
        model: Any network.

    Returns:
        Names of parameters by name of group, in the order of the network. Buffers belong to no group.

    Raises:
        ValueError: If the network's own groups leave a parameter out or name one twice.

    Source:
        Maini et al. (2023) for ResNet-9: convolution weight, batch-norm weight and bias are one layer.

    Example:
        >>> layer_groups(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)))
        {'0': ['0.weight', '0.bias', '1.weight', '1.bias'], '3': ['3.weight', '3.bias']}
    """
    # Asked of the class, because a compiled network passes on its original's methods, whose names are not its own.
    declared = getattr(type(model), "layer_groups", None)
    if declared is None:
        return _default_groups(model)
    groups: dict[str, list[str]] = declared(model)
    times = Counter(name for names in groups.values() for name in names)
    wrong = [name for name, _ in model.named_parameters() if times.pop(name, 0) != 1] + list(times)
    if wrong:
        raise ValueError(
            f"{type(model).__name__}.layer_groups() must name every parameter exactly once, "
            f"does not for {', '.join(wrong)}"
        )
    return groups


def _default_groups(model: nn.Module) -> dict[str, list[str]]:
    """Open a group at each weight layer, and let everything else join the group before it."""
    groups: dict[str, list[str]] = {}
    before_the_first: list[str] = []
    for name, parameter in model.named_parameters():
        path, _, own_name = name.partition(".parametrizations.")[0].rpartition(".")
        if ".parametrizations." in name:  # weight_norm and its like: the layer owns what its weight is made of
            path, own_name = f"{path}.{own_name}".lstrip("."), "weight"
        layer = model.get_submodule(path)
        # The bias comes before such a weight, so it is what opens the group.
        is_weight = (parameter.ndim >= 2 and "weight" in own_name) or is_parametrized(layer, "weight")
        if is_weight and "Norm" not in type(layer).__name__:
            groups.setdefault(path or own_name, [])
        joined = next(reversed(groups.values())) if groups else before_the_first
        joined.append(name)
    if before_the_first:
        first = next(iter(groups), "parameters")
        groups[first] = before_the_first + groups.get(first, [])
    return groups


def channels(model: nn.Module) -> dict[str, int]:
    """Count the output channels of every convolution and linear layer of any network.

    Args:
        model: Any network.

    Returns:
        Channels by module path, in the order of the network: filters of a convolution (transposed or not),
        outputs of a linear layer.

    Example:
        >>> channels(small_cnn(width=4))
        {'conv0.0': 4, 'conv1.0': 8, 'conv2.0': 8, 'conv3.0': 16, 'linear': 10}
    """
    counts = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            counts[path] = module.out_channels
        elif isinstance(module, nn.Linear):
            counts[path] = module.out_features
    return counts
