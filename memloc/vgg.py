"""VGG-16 with batch-norm, for images of 32×32 pixels and more, at any width."""

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from memloc.dropout import Slot

__all__ = ["vgg16"]

_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))  # convolutions of each stage, and their channels in widths
_SMALLEST = 2 ** len(_STAGES)  # pixels on each side: every stage halves them


class _VGG16(nn.Sequential):
    """Layers one after the other; each convolution or linear layer opens a layer group."""


def vgg16(in_channels: int = 3, num_classes: int = 10, width: int = 64, size: int = 32) -> nn.Sequential:
    """Build a VGG-16 with batch-norm and weights from torch's global generator.

    Five stages of two, two, three, three and three convolutions of 3×3, each with batch-norm and ReLU, end with a
    pooling that halves the image. Three linear layers follow.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Channels of the first stage; the paper's network has 64. The later stages have 2, 4, 8 and 8 times as
            many, and each of the two hidden linear layers has as many units as the last stage has channels.
        size: Height and width of the images in pixels, 32 or more. Smaller images have to be resized first.

    Returns:
        The network. Its children are its layers in the order of execution: ``conv0``, ``norm0``, ``relu0``, …, with
        ``pool0`` … ``pool4`` behind the stages, ``linear0`` … ``linear2`` at the end. Its sixteen layer groups are
        ``conv0`` … ``conv12``, each with its norm, and ``linear0`` … ``linear2``; its places for dropout are
        ``after0`` and ``after1``, behind the two hidden linear layers.

    Raises:
        ValueError: If the images are too small for five poolings.

    Source:
        Simonyan and Zisserman (2015), configuration D. Stephenson et al. (2021) train a VGG-16 on CIFAR-100; their code
        is not public, and this is one reading of that name. The convolutions are those of torchvision's ``vgg16_bn``,
        biases and initialization included. The linear layers have 512 units, as is usual for CIFAR, and no dropout:
        torchvision's have 4,096, for images of 224 pixels, and would hold nine tenths of the parameters. 15,253,578
        parameters for three colours and ten classes, 15,299,748 for a hundred.

    Example:
        >>> model = vgg16(num_classes=100)
        >>> sum(p.numel() for p in model.parameters())
        15299748
        >>> [name for name, _ in model.named_children()][:4]
        ['conv0', 'norm0', 'relu0', 'conv1']
    """
    if size < _SMALLEST:
        raise ValueError(f"size must be at least {_SMALLEST} pixels for VGG-16, got {size}: resize the images")
    hidden = _STAGES[-1][1] * width
    features = hidden * (size // _SMALLEST) ** 2
    return _VGG16(OrderedDict([*_stages(in_channels, width), *_linear_layers(features, hidden, num_classes)]))


def _stages(in_channels: int, width: int) -> Iterator[tuple[str, nn.Module]]:
    """Build the convolutions, initialized as torchvision's."""
    inputs, number = in_channels, 0
    for stage, (count, factor) in enumerate(_STAGES):
        for _ in range(count):
            conv = nn.Conv2d(inputs, factor * width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))
            yield f"conv{number}", conv
            yield f"norm{number}", nn.BatchNorm2d(factor * width)
            yield f"relu{number}", nn.ReLU()  # not in place: a hook on the norm has to see what the norm gave
            inputs, number = factor * width, number + 1
        yield f"pool{stage}", nn.MaxPool2d(2)


def _linear_layers(features: int, hidden: int, num_classes: int) -> Iterator[tuple[str, nn.Module]]:
    """Build the linear layers, initialized as torch does it."""
    yield "flatten", nn.Flatten()
    for number, inputs in enumerate((features, hidden)):
        yield f"linear{number}", nn.Linear(inputs, hidden)
        yield f"linear{number}_relu", nn.ReLU()
        yield f"after{number}", Slot(hidden)
    yield "linear2", nn.Linear(hidden, num_classes)
