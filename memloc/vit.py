"""The vision transformer for small data sets: shifted patches, and attention that looks away from itself."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SmallViT"]

_PATCH = 2  # pixels on each side
_BLOCKS = 6
_HEAD_WIDTH = 64
_DROPOUT = 0.1
_SHIFTS = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1))  # right, left, down, up, as F.pad takes them


class _PatchEmbedding(nn.Module):
    """Cut an image and four copies shifted by one pixel into patches, project each, add class token and positions."""

    def __init__(self, in_channels: int, width: int, size: int):
        super().__init__()
        features = (1 + len(_SHIFTS)) * in_channels * _PATCH**2
        self.norm = nn.LayerNorm(features)
        self.projection = nn.Linear(features, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // _PATCH) ** 2, width))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the tokens, shape ``(B, 1 + patches, width)``, the class token first."""
        shifted = torch.cat([images, *(F.pad(images, shift) for shift in _SHIFTS)], dim=1)
        patches = self.projection(self.norm(F.unfold(shifted, _PATCH, stride=_PATCH).transpose(1, 2)))
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.dropout(tokens + self.positions)


class _LocalityAttention(nn.Module):
    """Self-attention in which no token attends to itself, and the temperature of the softmax is learned."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.log_temperature = nn.Parameter(torch.tensor(-0.5 * math.log(width // heads)))
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Sequential(nn.Linear(width, width), nn.Dropout(_DROPOUT))

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute what the tokens of shape ``(B, T, width)`` see in each other."""
        split = self.queries_keys_values(self.norm(tokens)).unflatten(2, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        others = ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        seen = F.scaled_dot_product_attention(
            queries * self.log_temperature.exp(),
            keys,
            values,
            attn_mask=others,
            dropout_p=_DROPOUT if self.training else 0.0,
            scale=1.0,
        )
        return self.output(seen.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention and a perceptron with one hidden layer, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = _LocalityAttention(width, heads)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(width, width),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the next tokens, of the same shape ``(B, T, width)``."""
        tokens = tokens + self.attention(tokens)
        return tokens + self.perceptron(tokens)


class SmallViT(nn.Module):
    """The vision transformer of Maini et al., made for small data sets.

    Patches of 2×2 pixels are taken from the image and from four copies shifted by one pixel (shifted patch
    tokenization). Six blocks of attention, in which no token attends to itself and the temperature is learned
    (locality self-attention), and of perceptrons of the same width follow; a linear layer behind a norm reads the class
    token. Dropout is 0.1 everywhere.

    Its eight layer groups are ``patch_embedding``, ``block0`` … ``block5`` and ``head``. The class token and the
    positions belong to ``patch_embedding``.

    Args:
        in_channels: Colours of the images.
        num_classes: Classes.
        width: Length of a token and of the hidden layers: a multiple of 64, with a head for each 64, or less than 64,
            with one head. The paper's network has 512.
        size: Height and width of the images in pixels, even.

    Raises:
        ValueError: If the width cannot be divided into heads, or the size not into patches.

    Source:
        Maini et al. (2023), reference code: 9,628,296 parameters for 32×32 pixels in three colours, 9,577,016 for
        28×28 in one. There the class token and the positions are in no group. Tokenization and attention are those of
        Lee, Lee and Song (2021).

    Example:
        >>> sum(p.numel() for p in SmallViT(3, 10, 512, 32).parameters())
        9628296
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, size: int):
        super().__init__()
        if width > _HEAD_WIDTH and width % _HEAD_WIDTH:
            raise ValueError(f"width of SmallViT must be below {_HEAD_WIDTH} or a multiple of it, got {width}")
        if size % _PATCH:
            raise ValueError(f"size must be a multiple of the patch of SmallViT, {_PATCH} pixels, got {size}")
        self.size = size
        self.patch_embedding = _PatchEmbedding(in_channels, width, size)
        for number in range(_BLOCKS):
            self.add_module(f"block{number}", _Block(width, max(1, width // _HEAD_WIDTH)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, shape ``(B, K)``, of images of shape ``(B, C, size, size)``."""
        if images.shape[2:] != (self.size, self.size):
            raise ValueError(f"it takes {self.size}×{self.size} pixels")
        tokens = self.patch_embedding(images)
        for number in range(_BLOCKS):
            tokens = self.get_submodule(f"block{number}")(tokens)
        return self.head(tokens[:, 0])

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the parameters of each child: the patch embedding, the blocks, the head."""
        return {
            child: [f"{child}.{name}" for name, _ in module.named_parameters()]
            for child, module in self.named_children()
        }
