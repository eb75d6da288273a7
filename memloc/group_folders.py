"""Waterbirds and CelebA, from the folders in which their users have them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from memloc import sources
from memloc.groups import GroupedData, GroupedSplit, grouped

__all__ = ["celeba", "waterbirds"]

_BATCH = 256  # images decoded at a time
_WATERBIRDS = "waterbird_complete95_forest2water2"
_WATERBIRDS_PLACES = (_WATERBIRDS, f"waterbirds/{_WATERBIRDS}", f"cub/data/{_WATERBIRDS}", "waterbirds", ".")
_GET_WATERBIRDS = (
    f"download https://nlp.stanford.edu/data/dro/{_WATERBIRDS}.tar.gz (no licence stated; its photographs are of "
    "CUB-200-2011 and Places, for non-commercial research) and unpack it in"
)
_CELEBA_PLACES = ("celeba", "celebA", "CelebA", "celebA/data", ".")
_GET_CELEBA = (
    "download the aligned images, attributes and partition from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html "
    "(for non-commercial research only) and unpack them in celeba in"
)


def waterbirds(
    root: str | os.PathLike[str] | None = None,
    *,
    size: int = 64,
    examples: int | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> GroupedData:
    """Read Waterbirds: land birds and water birds in front of land or water.

    The folder ``waterbird_complete95_forest2water2``, as its archive unpacks, may lie below the root itself or in
    ``waterbirds`` or ``cub/data``, or be the root. Its ``metadata.csv`` has the columns ``img_filename``, ``y``,
    ``place`` and ``split`` (0 train, 1 validation, 2 test).

    Images are decoded at once, each as its central square, resized. As float32 the 11,788 of them take 12 size² bytes
    each: 0.6 GB at 64 pixels and 7 GB at 224. With ``encode`` only a batch of images is in memory at a time.

    Args:
        root: Where to look; by default :func:`memloc.sources.root`.
        size: Side of the images in pixels.
        examples: Take only the first so many of each split; by default all of them.
        encode: Gives what to keep of a batch of images, shape ``(B, 3, size, size)`` from -1 to 1 on ``device``: for
            example the features of a frozen network, shape ``(B, D)``. It runs without gradients.
        device: Where the tensors go.

    Returns:
        The data: label 1 is a water bird, attribute 1 is water.

    Raises:
        FileNotFoundError: If a file is not there; the message says where to get the data.
        ValueError: If an argument is out of range, the table has not the columns, a split is empty, or an image
            cannot be decoded.

    Source:
        Sagawa et al. (2020). Training groups are 3,498, 184, 56 and 1,057. Usually the images are resized to 256
        pixels, whatever their shape, before their central 224 are taken; here the central square is.

    Example:
        >>> waterbirds("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere/waterbird_complete95_forest2water2/metadata.csv is missing: download https:...
    """
    path = _find(root, _WATERBIRDS_PLACES, ("metadata.csv",), _GET_WATERBIRDS)
    table = _columns(path, _read_table(path), ("img_filename", "y", "place", "split"))
    table = table.set_axis(["file", "label", "attribute", "split"], axis=1)
    splits = _read(table, path, path.parent, size, examples, encode, device)
    return GroupedData("waterbirds", ("land bird", "water bird"), *splits, ("land", "water"))


def celeba(
    root: str | os.PathLike[str] | None = None,
    *,
    label: str = "Blond_Hair",
    attribute: str = "Male",
    size: int = 64,
    examples: int | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> GroupedData:
    """Read CelebA: faces with forty attributes, of which one is the label and one the spurious attribute.

    The root, or ``celeba``, ``CelebA`` or ``celebA/data`` below it, has the folder ``img_align_celeba`` (once more
    inside itself, as one archive unpacks, will do) and the tables ``list_attr_celeba`` and ``list_eval_partition``,
    both ``.txt`` as its authors publish them or both ``.csv`` as on Kaggle.

    Images are decoded at once, each as its central square of 178 pixels, resized. As float32 the 202,599 of them take
    12 size² bytes each: 10 GB at 64 pixels. Take fewer ``examples`` or pixels, or ``encode`` them, so that only a batch
    of images is in memory at a time.

    Args:
        root: Where to look; by default :func:`memloc.sources.root`.
        label: The attribute to predict.
        attribute: The spurious attribute.
        size: Side of the images in pixels.
        examples: Take only the first so many of each split; by default all of them.
        encode: As in :func:`waterbirds`.
        device: Where the tensors go.

    Returns:
        The data: label 1 has the one attribute, attribute 1 the other.

    Raises:
        FileNotFoundError: If a file is not there; the message says where to get the data.
        ValueError: If an argument is out of range, a table has not the columns, a split is empty, or an image cannot
            be decoded.

    Source:
        Liu et al. (2015); blond hair and gender are the choice of Sagawa et al. (2020), whose training groups are
        71,629, 66,874, 22,880 and 1,387.

    Example:
        >>> celeba("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere/celeba/list_attr_celeba.txt is missing: download the aligned images, ...
    """
    path = _find(root, _CELEBA_PLACES, ("list_attr_celeba.txt", "list_attr_celeba.csv"), _GET_CELEBA)
    partition_path = path.with_name(f"list_eval_partition{path.suffix}")
    if not partition_path.is_file():
        raise FileNotFoundError(f"{partition_path} is missing: {_GET_CELEBA} {path.parent.parent}")
    if path.suffix == ".txt":  # the first line is a count, and the column of the names has no title
        every = _read_table(path, sep=r"\s+", skiprows=1)
        partition = _read_table(partition_path, sep=r"\s+", header=None, index_col=0)
    else:
        every, partition = (_read_table(file, index_col=0) for file in (path, partition_path))
    chosen = _columns(path, every, (label, attribute))
    table = pd.DataFrame(
        {
            "file": chosen.index,
            "label": chosen[label].gt(0).astype(int).array,
            "attribute": chosen[attribute].gt(0).astype(int).array,
            "split": partition.iloc[:, 0].reindex(chosen.index).array,
        }
    )
    images = path.with_name("img_align_celeba")
    nested = images / images.name
    splits = _read(table, partition_path, nested if nested.is_dir() else images, size, examples, encode, device)
    classes, names = ((f"no {word}", word) for word in (name.replace("_", " ").lower() for name in (label, attribute)))
    return GroupedData("celeba", classes, *splits, names)


def _find(root: str | os.PathLike[str] | None, places: Sequence[str], files: Sequence[str], advice: str) -> Path:
    """Find the first of some files in the first of some folders below the root that has it."""
    top = sources.root() if root is None else Path(root).expanduser()
    for path in (top / place / file for place in places for file in files):
        if path.is_file():
            return path
    missing = top / places[0] / files[0]
    raise FileNotFoundError(f"{missing} is missing: {advice} {top}, or set MEMLOC_DATA to the folder that holds it")


def _read_table(path: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:  # pandas' own errors and wrong encodings are among them
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be a table, got what cannot be read ({reason}): unpack it again") from error


def _columns(path: Path, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Choose columns of a table, all of which must be there."""
    if absent := [name for name in names if name not in table.columns]:
        present = ", ".join(map(str, table.columns[:50]))
        raise ValueError(f"{path} must have the columns {', '.join(names)}, lacks {', '.join(absent)}, has {present}")
    return table[list(names)]


def _read(
    table: pd.DataFrame,
    path: Path,
    folder: Path,
    size: int,
    examples: int | None,
    encode: Callable[[Tensor], Tensor] | None,
    device: torch.device | str,
) -> tuple[GroupedSplit, GroupedSplit, GroupedSplit]:
    """Decode training, test and validation images of a table with file, label, attribute and split of each."""
    if size < 1 or (examples is not None and examples < 1):
        raise ValueError(f"size and examples must be at least 1, got {size} and {examples}")
    for name, largest in (("label", 1), ("attribute", 1), ("split", 2)):
        if not table[name].isin(range(largest + 1)).all():
            raise ValueError(f"{path} must give every image a {name} from 0 to {largest}, got others: unpack it again")
    splits = []
    for number, title in ((0, "training"), (2, "test"), (1, "validation")):
        rows = table[table["split"] == number].iloc[:examples]
        if rows.empty:
            raise ValueError(f"{path} must have {title} images (split {number}), got none: unpack it again")
        images = _decode([folder / str(file) for file in rows["file"]], size, encode, device)
        labels, attributes = (torch.tensor(rows[name].tolist(), device=device) for name in ("label", "attribute"))
        splits.append(grouped(images, labels, attributes))
    train, test, validation = splits
    return train, test, validation


def _decode(
    paths: Sequence[Path], size: int, encode: Callable[[Tensor], Tensor] | None, device: torch.device | str
) -> Tensor:
    """Decode images, or what is kept of them, a batch at a time into one tensor."""
    kept = torch.empty(0)
    for start in range(0, len(paths), _BATCH):
        batch = np.stack([_square(path, size) for path in paths[start : start + _BATCH]])
        images = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device, torch.float32).contiguous()
        images.div_(255).sub_(0.5).div_(0.5)
        with torch.no_grad():
            found = images if encode is None else encode(images)
        if len(found) != len(images):
            raise ValueError(f"encode must give one row per image, {len(images)}, got {tuple(found.shape)}")
        if start == 0:
            kept = torch.empty(len(paths), *found.shape[1:], device=device)
        kept[start : start + _BATCH] = found
    return kept


def _square(path: Path, size: int) -> np.ndarray:
    """Decode the central square of an image. Uint8, shape ``(size, size, 3)``."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing though its table names it: unpack the images again") from None
    except OSError as error:  # what is no image is an OSError too
        raise ValueError(f"{path} must be an image, got what cannot be decoded: unpack it again") from error
