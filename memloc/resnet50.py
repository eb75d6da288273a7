"""ResNet-50, as torchvision has it, at any width."""

from torch import Tensor, nn

from memloc import vision
from memloc.dropout import Slot

__all__ = ["ResNet50"]


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Build a stage of ResNet-50; its first block has a convolution beside it, which fits the sizes."""
    block, outputs = vision.torchvision().models.resnet.Bottleneck, 4 * width
    beside = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(block(inputs, width, stride, beside), *(block(outputs, width) for _ in range(blocks - 1)))


class ResNet50(nn.Module):
    """The residual network of fifty layers, with the stem that ImageNet's images need, whatever the images.

    Its six layer groups are ``stem``, ``layer1`` … ``layer4`` (each with the convolution beside its first block) and
    ``fc``. Its two places for dropout are ``after2`` and ``after3``, behind the second and the third stage.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Channels of the stem; the paper's network has 64, and all others scale with it. (``width_per_group`` of
            torchvision's function is another scale, of the narrow convolutions alone.)

    Source:
        Maini et al. (2023): torchvision's ``resnet50``, whose names and initialization these are, with another linear
        layer: 23,528,522 parameters for three colours.

    Example:
        >>> sum(p.numel() for p in ResNet50(3, 10, 64).parameters())
        23528522
    """

    def __init__(self, in_channels: int, num_classes: int, width: int):
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(in_channels, w, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(w, w, blocks=3, stride=1)
        self.layer2 = _stage(4 * w, 2 * w, blocks=4, stride=2)
        self.after2 = Slot(8 * w)
        self.layer3 = _stage(8 * w, 4 * w, blocks=6, stride=2)
        self.after3 = Slot(16 * w)
        self.layer4 = _stage(16 * w, 8 * w, blocks=3, stride=2)
        self.fc = nn.Linear(32 * w, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, shape ``(B, K)``, of images of shape ``(B, C, H, W)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.after2(self.layer2(self.layer1(x)))
        x = self.layer4(self.after3(self.layer3(x)))
        return self.fc(x.mean((2, 3)))

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the parameters of the stem, the four stages and the linear layer."""
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            child = name.partition(".")[0]
            groups.setdefault("stem" if child in ("conv1", "bn1") else child, []).append(name)
        return groups
