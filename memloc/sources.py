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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from torch import Tensor

from memloc.vision import torchvision

Tensors = tuple[Tensor, ...]  # images, labels, test_images, test_labels
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

    Example:
        >>> SOURCES["fashionmnist"].licence
        'MIT'
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
        "Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS workshop, 2011",
    ),
    "cifar-10n": Source(
        "CIFAR-10N, human labels for CIFAR-10",
        2_401_007,
        "https://github.com/UCSC-REAL/cifar-10-100n",
        "CC BY-NC 4.0 (non-commercial)",
        "J. Wei et al., Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations, ICLR 2022",
    ),
    "cscores": Source(
        "C-scores (consistency scores) of CIFAR-10 and MNIST",
        1_280_598,
        "https://pluskid.github.io/structural-regularity/",
        "none stated",
        "Z. Jiang, C. Zhang, K. Talwar, M. C. Mozer, Characterizing Structural Regularities of Labeled Data in "
        "Overparameterized Models, ICML 2021",
    ),
}
"""Size, homepage, licence and citation of every data set, human labels and C-scores included."""

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
_PLAIN_MD5 = {  # files that torchvision does not know; each lies in a folder with the name of its data set
    "cifar-10n": {"CIFAR-10_human.pt": "96644db5574813cae939af5f7f2a0aec"},
    "cscores": {
        "cifar10-cscores-orig-order.npz": "fb902aa1f18832b245ce899c1808d1ca",
        "mnist-cscores.npy": "ee2a5e57104681eb120c7660c38863e8",
    },
}
_PLAIN_URL = {
    "cifar-10n": "https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/HEAD/data/",
    "cscores": "https://pluskid.github.io/structural-regularity/cscores/",
}


def root() -> Path:
    """Find the folder that holds the data sets, in torchvision's layout.

    Returns:
        ``$MEMLOC_DATA`` if it is set, else ``data`` in memloc's folder of the platform's cache.

    Example:
        >>> isinstance(root(), Path)
        True
    """
    chosen = os.environ.get("MEMLOC_DATA")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("memloc", False) / "data"


def contents(name: str, root: str | os.PathLike[str] | None = None) -> Iterator[bytes]:
    """Read the files of a data set one after the other, each only if it is the official one.

    Of Fashion-MNIST and KMNIST these are the compressed files, since only they have an official checksum.

    Args:
        name: A key of :data:`SOURCES`.
        root: The folder that holds the data sets; by default :func:`root`.

    Yields:
        The content of the next file; of ``digits``, which has none, nothing.

    Raises:
        ValueError: If the name is unknown, or a file is truncated or altered.
        FileNotFoundError: If a file is not there.

    Example:
        >>> len(list(contents("digits")))
        0
    """
    for file in _official_files(name):
        yield read_checked(name, file, root)


def read_checked(name: str, file: str, root: str | os.PathLike[str] | None = None, md5: str | None = None) -> bytes:
    """Read one file of a data set if it is the official one.

    Args:
        name: A key of :data:`SOURCES`.
        file: Its path below the root.
        root: The folder that holds the data sets; by default :func:`root`.
        md5: What its MD5 must be, for a file that is not among the official ones.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is truncated or altered.
    """
    path, md5 = _folder(root) / file, md5 or _official_files(name)[file]
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is missing: run `memloc data get {name}`, or set MEMLOC_DATA to the folder that holds {name}"
        ) from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is truncated or altered (MD5 {found}, expected {md5}): run `memloc data get {name}` to replace it"
        )
    return content


def is_complete(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Tell whether every file of a data set is there and is the official one.

    Args:
        name: A key of :data:`SOURCES`.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        True if whoever reads the data set will find what is needed.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> is_complete("digits")
        True
    """
    check_name(name, SOURCES)
    try:
        for _ in contents(name, root):
            pass
    except (FileNotFoundError, ValueError):
        return False
    return True


def get(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Download a data set, unless it is complete already.

    The files arrive in a temporary folder beside their place, are compared with the official checksums and
    only then moved, each in one step. After a failure or Ctrl-C nothing of the attempt is left but an empty
    ``.lock``, by which two processes that want the same data do the work once.

    Args:
        name: A key of :data:`SOURCES`.
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
    if is_complete(name, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if not is_complete(name, folder):  # another process may have got it while this one waited
                _download(name, folder)
    except _DOWNLOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name} could not be downloaded ({reason}): try again with a network, or copy its files to {folder}"
        ) from error
    return folder


_DOWNLOAD_ERRORS = (  # no network, wrong checksum, cut short
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    tarfile.TarError,
    http.client.HTTPException,
)


def _download(name: str, folder: Path) -> None:
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        _fetch(name, partial)
        for _ in contents(name, partial):
            pass  # reading is checking
        files = [path for path in partial.rglob("*") if path.is_file() and not path.match("*.tar.gz")]
        for file in files:
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(name: str, folder: Path) -> None:
    datasets = torchvision().datasets
    for file, md5 in _PLAIN_MD5.get(name, {}).items():
        datasets.utils.download_url(_PLAIN_URL[name] + file, folder / name, file, md5)
    if name in _TORCHVISION:
        for split in ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({},):
            getattr(datasets, _TORCHVISION[name])(folder, download=True, **split)


def _official_files(name: str) -> dict[str, str]:
    """List what a data set consists of: path below the root and MD5, in the order in which it is read."""
    check_name(name, SOURCES)
    if name == "digits":
        return {}
    if name == "mnist":
        return {f"MNIST/raw/{file}": md5 for file, md5 in _MNIST_MD5.items()}
    if name in _PLAIN_MD5:
        return {f"{name}/{file}": md5 for file, md5 in _PLAIN_MD5[name].items()}
    dataset = getattr(torchvision().datasets, _TORCHVISION[name])
    if name in ("fashionmnist", "kmnist"):
        return {f"{dataset.__name__}/raw/{file}": md5 for file, md5 in dataset.resources}
    if name == "svhn":
        return {dataset.split_list[split][1]: dataset.split_list[split][2] for split in ("train", "test")}
    files = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    return {f"{dataset.base_folder}/{file}": md5 for file, md5 in files}


def read(name: str, root: str | os.PathLike[str] | None = None) -> tuple[Sequence[str], Tensors]:
    """Decode the files of a data set.

    Args:
        name: One of :data:`NAMES`.
        root: The folder that holds the data sets; by default :func:`root`.

    Returns:
        The class names, and the tensors images, labels, test images, test labels. Images are uint8, shape
        ``(N, C, H, W)``; those of ``digits``, which have 17 shades of grey, are float32 and scaled.

    Raises:
        ValueError: If the name is unknown, or a file is truncated or altered.
        FileNotFoundError: If a file is not there.

    Example:
        >>> classes, (images, labels, test_images, test_labels) = read("digits")
        >>> len(classes), len(images), len(test_labels)
        (10, 1297, 500)
    """
    check_name(name, NAMES)
    if name == "digits":
        return _DIGITS, _read_digits()
    files = contents(name, root)
    if name == "svhn":
        return _DIGITS, _read_svhn(files)
    if name in ("cifar10", "cifar100"):
        return _read_cifar(files, "fine_" if name == "cifar100" else "")
    if name == "mnist":
        return _DIGITS, _read_idx(files)
    return getattr(torchvision().datasets, _TORCHVISION[name]).classes, _read_idx(map(gzip.decompress, files))


def _read_digits() -> Tensors:
    from sklearn.datasets import load_digits

    sixteenths, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = sixteenths.float().view(-1, 1, 8, 8).div_(8).sub_(1)
    return images[:-500], labels[:-500], images[-500:], labels[-500:]


def _read_cifar(files: Iterable[bytes], prefix: str) -> tuple[Sequence[str], Tensors]:
    # A pickle could run code; these have the official checksums.
    *train, test, meta = (pickle.loads(content, encoding="latin1") for content in files)
    tensors: list[Tensor] = []
    for batches in (train, [test]):
        pixels = np.concatenate([batch["data"] for batch in batches])
        tensors.append(torch.from_numpy(pixels).view(-1, 3, 32, 32))
        tensors.append(torch.tensor([label for batch in batches for label in batch[f"{prefix}labels"]]))
    return meta[f"{prefix}label_names"], tuple(tensors)


def _read_svhn(files: Iterable[bytes]) -> Tensors:
    from scipy.io import loadmat

    tensors: list[Tensor] = []
    for content in files:
        split = loadmat(io.BytesIO(content))
        tensors.append(torch.from_numpy(split["X"]).permute(3, 2, 0, 1))  # from (H, W, C, N)
        tensors.append(torch.from_numpy(split["y"]).flatten() % 10)  # the digit 0 has the label 10
    return tuple(tensors)


def _read_idx(files: Iterable[bytes]) -> Tensors:
    """Decode MNIST's format: two zero bytes, type, number of dimensions, big-endian sizes, then the bytes."""
    tensors: list[Tensor] = []
    for content in files:
        sizes = np.frombuffer(content, ">i4", content[3], offset=4)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + sizes.nbytes)
        tensors.append(values.view(-1, 1, *sizes[1:].tolist()) if len(sizes) > 1 else values)
    return tuple(tensors)


def check_name(name: str, known: Collection[str], argument: str = "name") -> None:
    """Refuse a name that is not known.

    Args:
        name: What was asked for.
        known: What there is.
        argument: What the caller calls it, for the message.

    Raises:
        ValueError: If the name is not among them; it says which one comes nearest.

    Example:
        >>> check_name("cifar11", ("cifar10", "mnist"))
        Traceback (most recent call last):
        ValueError: name must be one of cifar10, mnist, got 'cifar11' (did you mean cifar10?)
    """
    if name not in known:
        near = "".join(f" (did you mean {match}?)" for match in difflib.get_close_matches(name, known, 1))
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}{near}")


def _folder(given: str | os.PathLike[str] | None) -> Path:
    return root() if given is None else Path(given).expanduser()
