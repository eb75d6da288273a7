"""No test here reaches a network: the data sets are imitated, a few images each, and served on 127.0.0.1."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from memloc import sources
from memloc.vision import torchvision

DOWNLOADED = sources.NAMES[1:]
PLAIN = ("cifar-10n", "cscores")  # files that torchvision does not know
# Python 3.12 and 3.13 announce that 3.14 unpacks archives more carefully; torchvision does not choose yet.
pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


class Imitation:
    """A few images of a data set: in a folder to read from, and packed in another to download from."""

    def __init__(self, name: str, home: Path, patch: pytest.MonkeyPatch):
        self.name, self.root, self.served, self.patch = name, home / "root", home / "served", patch
        self.root.mkdir()
        self.served.mkdir()
        rng = np.random.default_rng(0)
        shape = (28, 28) if "mnist" in name else (3, 32, 32)
        if name in PLAIN:
            self.write_plain()
            return
        self.images, self.test_images = (rng.integers(0, 256, (n, *shape), np.uint8) for n in (10, 4))
        self.labels, self.test_labels = (rng.integers(0, 10, n) for n in (10, 4))
        self.dataset = getattr(torchvision().datasets, sources._TORCHVISION[name])
        {"svhn": self.write_svhn, "cifar10": self.write_cifar, "cifar100": self.write_cifar}.get(
            name, self.write_mnist
        )()

    @property
    def files(self) -> list[Path]:
        """What has an official checksum."""
        return [self.root / file for file in sources._official_files(self.name)]

    def write_mnist(self) -> None:
        raw, packed_md5 = self.root / self.dataset.__name__ / "raw", {}
        raw.mkdir(parents=True)
        arrays = {
            "train-images-idx3-ubyte": self.images,
            "train-labels-idx1-ubyte": self.labels.astype(np.uint8),
            "t10k-images-idx3-ubyte": self.test_images,
            "t10k-labels-idx1-ubyte": self.test_labels.astype(np.uint8),
        }
        for file, array in arrays.items():
            (raw / file).write_bytes(idx(array))
            for folder in (raw, self.served):
                (folder / f"{file}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
            packed_md5[f"{file}.gz"] = md5(raw / f"{file}.gz")
        self.patch.setattr(self.dataset, "resources", list(packed_md5.items()))
        if self.name == "mnist":
            self.patch.setattr(sources, "_MNIST_MD5", {file: md5(raw / file) for file in arrays})

    def write_plain(self) -> None:
        (self.root / self.name).mkdir()
        official = {}
        for number, file in enumerate(sources._PLAIN_MD5[self.name]):
            content = f"the file number {number} of {self.name}".encode()
            (self.root / self.name / file).write_bytes(content)
            (self.served / file).write_bytes(content)
            official[file] = hashlib.md5(content).hexdigest()
        self.patch.setitem(sources._PLAIN_MD5, self.name, official)

    def write_cifar(self) -> None:
        folder, kind = self.root / self.dataset.base_folder, "fine_" if self.name == "cifar100" else ""
        folder.mkdir()
        batches = np.array_split(np.arange(10), len(self.dataset.train_list))
        entries = {
            file: {"data": self.images[batch].reshape(-1, 3072), f"{kind}labels": self.labels[batch].tolist()}
            for (file, _), batch in zip(self.dataset.train_list, batches, strict=True)
        }
        test, meta = self.dataset.test_list[0][0], dict(self.dataset.meta)
        entries[test] = {
            "data": self.test_images.reshape(-1, 3072),
            f"{kind}labels": self.test_labels.tolist(),
        }
        entries[meta["filename"]] = {f"{kind}label_names": [f"class {number}" for number in range(10)]}
        for file, entry in entries.items():
            (folder / file).write_bytes(pickle.dumps(entry))
        *train, test_md5, meta_md5 = ([file, md5(folder / file)] for file in entries)
        archive = self.served / self.dataset.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, self.dataset.base_folder)
        for attribute, value in {
            "train_list": train,
            "test_list": [test_md5],
            "meta": meta | {"md5": meta_md5[1]},
            "tgz_md5": md5(archive),
        }.items():
            self.patch.setattr(self.dataset, attribute, value)

    def write_svhn(self) -> None:
        table = {}
        for split, images, labels in (
            ("train", self.images, self.labels),
            ("test", self.test_images, self.test_labels),
        ):
            content = io.BytesIO()
            ten_for_zero = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
            savemat(content, {"X": images.transpose(2, 3, 1, 0), "y": ten_for_zero})
            for folder in (self.root, self.served):
                (folder / f"{split}_32x32.mat").write_bytes(content.getvalue())
            table[split] = [None, f"{split}_32x32.mat", md5(self.root / f"{split}_32x32.mat")]
        self.patch.setattr(self.dataset, "split_list", table)

    def serve_at(self, address: str) -> None:
        """Let downloads look there."""
        if self.name in PLAIN:
            self.patch.setitem(sources._PLAIN_URL, self.name, address)
        elif self.name == "svhn":
            table = {split: [address + row[1], *row[1:]] for split, row in self.dataset.split_list.items()}
            self.patch.setattr(self.dataset, "split_list", table)
        elif self.name.startswith("cifar"):
            self.patch.setattr(self.dataset, "url", address + self.dataset.filename)
        else:
            self.patch.setattr(self.dataset, "mirrors", [address])


@pytest.fixture(params=[*DOWNLOADED, *PLAIN])
def imitation(request, tmp_path, monkeypatch):
    return Imitation(request.param, tmp_path, monkeypatch)


@pytest.fixture
def requests():
    """How often each path was asked of the server."""
    return Counter()


@pytest.fixture
def served(imitation, requests, monkeypatch):
    """The imitation, to be downloaded from this machine into an empty folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            requests[self.path] += 1
            super().do_GET()

    monkeypatch.setenv("no_proxy", "*")
    imitation.root = imitation.root.parent / "new"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=imitation.served)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        imitation.serve_at(f"http://127.0.0.1:{server.server_port}/")
        yield imitation
        server.shutdown()
        thread.join()


def visible(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_every_data_set_has_its_terms():
    assert set(sources.SOURCES) == {*sources.NAMES, *PLAIN}
    assert sources._PLAIN_URL.keys() == sources._PLAIN_MD5.keys() == set(PLAIN)
    for name, source in sources.SOURCES.items():
        assert all((source.name, source.url.startswith("http"), source.licence, source.citation))
        assert (source.size_bytes > 0) == (name != "digits")


@pytest.mark.parametrize("imitation", DOWNLOADED, indirect=True)
def test_images_come_as_uint8_with_channels_first_and_labels_as_classes(imitation):
    classes, tensors = sources.read(imitation.name, imitation.root)
    images, labels, test_images, test_labels = (tensor.numpy() for tensor in tensors)
    assert images.dtype == test_images.dtype == np.uint8
    assert len(classes) == 10
    assert np.array_equal(images, imitation.images.reshape(images.shape))
    assert np.array_equal(test_images, imitation.test_images.reshape(test_images.shape))
    assert images.shape[1:] == ((1, 28, 28) if "mnist" in imitation.name else (3, 32, 32))
    assert labels.tolist() == imitation.labels.tolist()
    assert test_labels.tolist() == imitation.test_labels.tolist()


@pytest.mark.parametrize("imitation", DOWNLOADED, indirect=True)
def test_torchvision_reads_the_same(imitation):
    _, (images, labels, test_images, test_labels) = sources.read(imitation.name, imitation.root)
    for train, pixels, numbers in ((True, images, labels), (False, test_images, test_labels)):
        split = {"split": "train" if train else "test"} if imitation.name == "svhn" else {"train": train}
        for index, (picture, number) in enumerate(imitation.dataset(imitation.root, **split)):
            picture = np.array(picture).reshape(*pixels.shape[2:], -1).transpose(2, 0, 1)
            assert np.array_equal(picture, pixels[index])
            assert number == numbers[index]


def test_any_altered_or_truncated_file_is_refused_by_name_with_the_command_that_repairs_it(imitation):
    assert sources.is_complete(imitation.name, imitation.root)
    for path in imitation.files:
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is truncated or altered") as refusal:
                list(sources.contents(imitation.name, imitation.root))
            assert str(path) in str(refusal.value)
            assert f"`memloc data get {imitation.name}`" in str(refusal.value)
            assert "\n" not in str(refusal.value)
            assert not sources.is_complete(imitation.name, imitation.root)
        path.write_bytes(whole)


def test_any_missing_file_is_named_with_the_command_that_gets_it(imitation):
    for path in imitation.files:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match="MEMLOC_DATA") as refusal:
            list(sources.contents(imitation.name, imitation.root))
        assert str(path) in str(refusal.value)
        assert f"`memloc data get {imitation.name}`" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert not sources.is_complete(imitation.name, imitation.root)
        path.write_bytes(whole)


@pytest.mark.parametrize("imitation", ["mnist"], indirect=True)
def test_files_that_torchvision_would_read_unchecked_are_not_read(imitation):
    processed = imitation.root / "MNIST" / "processed"
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(10, 28, 28, dtype=torch.uint8), torch.zeros(10)), processed / file)
    _, (images, *_) = sources.read("mnist", imitation.root)
    assert images.any()


def test_downloading_leaves_the_official_files_and_nothing_else(served):
    assert sources.get(served.name, served.root) == served.root
    assert sources.is_complete(served.name, served.root)
    assert visible(served.root) == visible(served.root.parent / "root")


def test_a_complete_data_set_is_not_downloaded_again(served, requests):
    sources.get(served.name, served.root)
    before = requests.copy()
    sources.get(served.name, served.root)
    assert requests == before
    assert before


def test_two_downloads_at_once_do_the_work_once(served, requests):
    threads = [threading.Thread(target=sources.get, args=(served.name, served.root)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sources.is_complete(served.name, served.root)
    assert set(requests.values()) == {2}  # torchvision asks twice: once to follow redirects, once to read


def test_downloading_repairs_a_damaged_file_and_clears_what_a_killed_download_left(served):
    sources.get(served.name, served.root)
    served.files[0].write_bytes(b"damaged")
    leftover = served.root / f".{served.name}.partial"
    leftover.mkdir()
    (leftover / "half").touch()
    sources.get(served.name, served.root)
    assert visible(served.root) == visible(served.root.parent / "root")


def test_a_download_cut_short_is_one_line_and_changes_nothing(served):
    sources.get(served.name, served.root)
    served.files[0].write_bytes(b"damaged")
    before = visible(served.root)
    for path in served.served.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match=f"{served.name} could not be downloaded") as failure:
        sources.get(served.name, served.root)
    assert "\n" not in str(failure.value)
    assert visible(served.root) == before


def test_without_a_network_there_is_one_line_and_nothing_is_left(imitation, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as closed:
        port = closed.server_port
    imitation.serve_at(f"http://127.0.0.1:{port}/")
    empty = imitation.root.parent / "new"
    with pytest.raises(OSError, match=f"{imitation.name} could not be downloaded .*refused") as failure:
        sources.get(imitation.name, empty)
    assert "\n" not in str(failure.value)
    assert visible(empty) == {}


def test_ctrl_c_leaves_nothing_half_written(served, monkeypatch):
    def interrupted(url: str, filename: str, **_: object) -> None:
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision().datasets.utils, "_urlretrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.get(served.name, served.root)
    assert visible(served.root) == {}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="mnist could not be downloaded"):
        sources.get("mnist", tmp_path / "file")


def test_digits_need_no_file(tmp_path):
    assert sources.get("digits", tmp_path) == tmp_path
    assert sources.is_complete("digits", tmp_path)
    assert visible(tmp_path) == {}


@pytest.mark.parametrize("ask", [sources.get, sources.is_complete, sources.read])
def test_an_unknown_name_is_refused_with_the_nearest_one(ask, tmp_path):
    with pytest.raises(ValueError, match=r"got 'cifar11' \(did you mean cifar10\?\)"):
        ask("cifar11", tmp_path)
    with pytest.raises(ValueError, match=r"name must be one of digits, .* got 'x'$"):
        ask("x", tmp_path)


def test_the_root_is_the_environments_else_the_platforms_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLOC_DATA", "~/images")
    assert sources.root() == Path.home() / "images"
    monkeypatch.delenv("MEMLOC_DATA")
    assert sources.root().parts[-2:] == ("memloc", "data")
    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        sources.read("mnist")
