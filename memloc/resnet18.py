"""ResNet-18 for small images, of torchvision's blocks, at any width."""

from torch import Tensor, nn

from memloc import vision
from memloc.dropout import Slot

__all__ = ["ResNet18"]


def _stage(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Build two blocks; the first has a convolution beside it where it changes the size or the channels."""
    block, beside = vision.torchvision().models.resnet.BasicBlock, None
    if stride > 1 or inputs != width:
        beside = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(block(inputs, width, stride, beside), block(width, width))


class ResNet18(nn.Module):
    """The residual network of eighteen layers with a stem for small images: a 3×3 convolution, and no pooling.

    Four stages of two blocks have 1, 2, 4 and 8 times the channels of the stem; all but the first halve the image. Any
    size will do, from one pixel; 32 are meant.

    Its ten layer groups are ``stem``, a group for each block, ``layer1.0`` … ``layer4.1`` (with the convolution beside
    it where it has one), and ``fc``. Its two places for dropout are ``after2`` and ``after3``, behind the second and
    the third stage.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Channels of the stem, 1 or more; 64 is the network of the literature, and all others scale with it.

    Source:
        He et al. (2016) with the stem that is usual for CIFAR: 11,173,962 parameters for three colours and ten classes,
        11,220,132 for a hundred. Names and initialization are those of torchvision's ``resnet18``. Stephenson et al.
        (2021) vary the width; their code is not public, and the range of parameters in their figure 4 is that of
        widths 4 to 64. Nakkiran et al. (2020), who found double descent this way, scale the widths alike but put
        batch-norm and ReLU before each convolution.

    Example:
        >>> sum(p.numel() for p in ResNet18(3, 10, 64).parameters())
        11173962
    """

    def __init__(self, in_channels: int, num_classes: int, width: int):
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(in_channels, w, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(w, w, stride=1)
        self.layer2 = _stage(w, 2 * w, stride=2)
        self.after2 = Slot(2 * w)
        self.layer3 = _stage(2 * w, 4 * w, stride=2)
        self.after3 = Slot(4 * w)
        self.layer4 = _stage(4 * w, 8 * w, stride=2)
        self.fc = nn.Linear(8 * w, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, shape ``(B, K)``, of images of shape ``(B, C, H, W)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.after2(self.layer2(self.layer1(x)))
        x = self.layer4(self.after3(self.layer3(x)))
        return self.fc(x.mean((2, 3)))

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the parameters of the stem, of each block and of the linear layer."""
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            child, inside, *_ = name.split(".")
            group = {"conv1": "stem", "bn1": "stem", "fc": "fc"}.get(child, f"{child}.{inside}")
            groups.setdefault(group, []).append(name)
        return groups
