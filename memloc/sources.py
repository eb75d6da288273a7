"""Where the data sets come from: terms, official files, checksums, downloads.

Nothing is downloaded unless :func:`get` is called, and no file is used before its MD5 has been compared with
the official one.
"""

import difflib
import gzip
import hashlib
import http.client
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from filelock import FileLock

from memloc.vision import torchvision

Arrays = tuple[Any, ...]  # images, labels, test_images, test_labels: numpy arrays or tensors
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and on what terms.

    Attributes:
        name: The name it goes by, e.g. "Fashion-MNIST".
        size_bytes: What is downloaded, in bytes; 0 where nothing is.
        url: The homepage or repository of its authors.
        licence: Its licence, or what the authors say instead.
        citation: Whom to cite.
    """

    name: str
    size_bytes: int
    url: str
    licence: str
    citation: str


_CIFAR_LICENCE = "none stated; the authors ask for the citation"
_KRIZHEVSKY = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009"

SOURCES: dict[str, Source] = {
    "digits": Source(
        "Optical recognition of handwritten digits, as shipped with scikit-learn",
        0,
        "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        "CC BY 4.0",
        "E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998",
    ),
    "mnist": Source(
        "MNIST",
        11_594_722,
        "http://yann.lecun.com/exdb/mnist/",
        "CC BY-SA 3.0 as commonly stated; the official page names none",
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document "
        "recognition, Proceedings of the IEEE 86(11), 1998",
    ),
    "fashionmnist": Source(
        "Fashion-MNIST",
        30_878_645,
        "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        "H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine "
        "Learning Algorithms, arXiv 1708.07747, 2017",
    ),
    "kmnist": Source(
        "Kuzushiji-MNIST",
        21_240_888,
        "https://github.com/rois-codh/kmnist",
        "CC BY-SA 4.0",
        "T. Clanuwat et al., Deep Learning for Classical Japanese Literature, arXiv 1812.01718, 2018",
    ),
    "cifar10": Source(
        "CIFAR-10", 170_498_071, "https://www.cs.toronto.edu/~kriz/cifar.html", _CIFAR_LICENCE, _KRIZHEVSKY
    ),
    "cifar100": Source(
        "CIFAR-100", 169_001_437, "https://www.cs.toronto.edu/~kriz/cifar.html", _CIFAR_LICENCE, _KRIZHEVSKY
    ),
    "svhn": Source(
        "Street View House Numbers, cropped digits",
        246_316_178,
        "http://ufldl.stanford.edu/housenumbers/",
        "for non-commercial use only",
        "Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, "
        "NIPS workshop, 2011",
    ),
    "cifar-10n": Source(
        "CIFAR-10N, human labels for CIFAR-10",
        2_401_007,
        "https://github.com/UCSC-REAL/cifar-10-100n",
        "CC BY-NC 4.0 (non-commercial)",
        "J. Wei et al., Learning with Noisy Labels Revisited: A Study Using Real-World Human "
        "Annotations, ICLR 2022",
    ),
}
"""Size, homepage, licence and citation of every data set, the human labels of CIFAR-10N included."""

NAMES: tuple[str, ...] = ("digits", "mnist", "fashionmnist", "kmnist", "cifar10", "cifar100", "svhn")
"""The data sets that :func:`memloc.datasets.load` knows."""

_TORCHVISION = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
# torchvision knows the MD5 of MNIST's compressed files only, and reads the uncompressed ones unchecked.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def root() -> Path:
    """Find the folder that holds the data sets, in torchvision's layout.

    Returns:
        ``$MEMLOC_DATA`` if it is set, else ``data`` in memloc's folder of the platform's cache.
    """
    folder = os.environ.get("MEMLOC_DATA")
    return (
        Path(folder).expanduser() if folder else Path(platformdirs.user_cache_dir("memloc", False)) / "data"
    )


def is_complete(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Tell whether every file of a data set is there and is the official one.

    Args:
        name: One of :data:`NAMES`.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        True if :func:`load` will find what it needs.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> is_complete("digits")
        True
    """
    _check_name(name)
    try:
        for path, md5 in _official_files(name).items():
            _verified(name, _folder(root) / path, md5)
    except (FileNotFoundError, ValueError):
        return False
    return True


def get(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set through torchvision, unless it is complete already.

    The files arrive in a temporary folder beside their place, are compared with the official checksums and
    only then moved, each in one step. After a failure or Ctrl-C nothing of the attempt is left.

    Args:
        name: One of :data:`NAMES`. CIFAR-10N has to be fetched by hand; asking for it says how.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        The folder that holds the data sets.

    Raises:
        ValueError: If the name is unknown.
        OSError: If the download fails.

    Example:
        >>> get("digits", "anywhere").name  # nothing to do: scikit-learn ships them
        'anywhere'
    """
    folder = _folder(root)
    if name == "cifar-10n":
        raise ValueError(
            f"cifar-10n must be fetched by hand: save data/CIFAR-10_human.pt of {SOURCES[name].url} "
            f"as {folder / name / 'CIFAR-10_human.pt'}"
        )
    if is_complete(name, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if not is_complete(name, folder):  # another process may have got it while this one waited
                _download(name, folder)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        tarfile.TarError,
        http.client.HTTPException,
    ) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name} could not be downloaded ({reason}): "
            f"try again with a network, or copy its files to {folder}"
        ) from error
    return folder


def _download(name: str, folder: Path) -> None:
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        dataset = getattr(torchvision().datasets, _TORCHVISION[name])
        for split in ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({},):
            dataset(partial, download=True, **split)
        for path, md5 in _official_files(name).items():
            _verified(name, partial / path, md5)
        for archive in partial.glob("*.tar.gz"):
            archive.unlink()
        _move_files(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    for file in [path for path in source.rglob("*") if path.is_file()]:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _official_files(name: str) -> dict[str, str]:
    """List what a data set consists of: path below the root and MD5, in the order in which it is read."""
    if name == "digits":
        return {}
    if name == "mnist":
        return {f"MNIST/raw/{file}": md5 for file, md5 in _MNIST_MD5.items()}
    dataset = getattr(torchvision().datasets, _TORCHVISION[name])
    if name in ("fashionmnist", "kmnist"):
        return {f"{dataset.__name__}/raw/{file}": md5 for file, md5 in dataset.resources}
    if name == "svhn":
        return {dataset.split_list[split][1]: dataset.split_list[split][2] for split in ("train", "test")}
    files = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    return {f"{dataset.base_folder}/{file}": md5 for file, md5 in files}


def _verified(name: str, path: Path, md5: str) -> bytes:
    """Read a file and return its content only if it is the official one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: run `memloc data get {name}`, "
            f"or set MEMLOC_DATA to the folder that holds {name}"
        ) from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is truncated or altered (MD5 {found}, expected {md5}): "
            f"run `memloc data get {name}` to replace it"
        )
    return content


def read(name: str, root: str | os.PathLike[str] | None = None) -> tuple[Sequence[str], Arrays]:
    """Read the official files of a data set, each compared with its checksum first.

    Of Fashion-MNIST and KMNIST only the compressed files have an official checksum, so those are what is read.

    Args:
        name: One of :data:`NAMES`.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        The class names, and the arrays images, labels, test images, test labels. Images are uint8, shape
        ``(N, C, H, W)`` or ``(N, H, W)``; those of ``digits`` are float32, scaled.

    Raises:
        ValueError: If the name is unknown, or a file is truncated or altered.
        FileNotFoundError: If a file is not there.

    Example:
        >>> classes, (images, labels, test_images, test_labels) = read("digits")
        >>> len(classes), len(images), len(test_labels)
        (10, 1297, 500)
    """
    _check_name(name)
    if name == "digits":
        return _read_digits()
    files = _official_files(name).items()
    contents = (_verified(name, _folder(root) / path, md5) for path, md5 in files)
    if name == "svhn":
        return _DIGITS, _read_svhn(contents)
    if name in ("cifar10", "cifar100"):
        return _read_cifar(contents, "fine_" if name == "cifar100" else "")
    if name == "mnist":
        return _DIGITS, tuple(map(_read_idx, contents))
    classes = getattr(torchvision().datasets, _TORCHVISION[name]).classes
    return classes, tuple(_read_idx(gzip.decompress(content)) for content in contents)


def _read_digits() -> tuple[Sequence[str], Arrays]:
    from sklearn.datasets import load_digits

    sixteenths, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(sixteenths).float().view(-1, 1, 8, 8).div_(8).sub_(1)
    return _DIGITS, (images[:-500], labels[:-500], images[-500:], labels[-500:])


def _read_cifar(contents: Iterable[bytes], prefix: str) -> tuple[Sequence[str], Arrays]:
    # A pickle can run code; these have the official checksums.
    *train, test, meta = (pickle.loads(content, encoding="latin1") for content in contents)
    images, test_images = (
        np.concatenate([batch["data"] for batch in split]).reshape(-1, 3, 32, 32) for split in (train, [test])
    )
    labels = [label for batch in train for label in batch[f"{prefix}labels"]]
    return meta[f"{prefix}label_names"], (
        images,
        np.array(labels),
        test_images,
        np.array(test[f"{prefix}labels"]),
    )


def _read_svhn(contents: Iterable[bytes]) -> Arrays:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    train, test = (loadmat(io.BytesIO(content)) for content in contents)
    # X is (H, W, C, N); y says 10 for the digit 0.
    images, test_images = (split["X"].transpose(3, 2, 0, 1) for split in (train, test))
    labels, test_labels = (split["y"].reshape(-1).astype(np.int64) % 10 for split in (train, test))
    return images, labels, test_images, test_labels


def _read_idx(content: bytes) -> np.ndarray:
    """Decode MNIST's format: two zero bytes, type, number of dimensions, big-endian sizes, then the bytes."""
    sizes = np.frombuffer(content, ">i4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)


def _check_name(name: str) -> None:
    if name not in NAMES:
        near = "".join(f" (did you mean {match}?)" for match in difflib.get_close_matches(name, NAMES, 1))
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}{near}")


def _folder(given: str | os.PathLike[str] | None) -> Path:
    return root() if given is None else Path(given)
