"""What every test shares: the device, a run store of its own, and data outside the repository."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from memloc import datasets, labelnoise, models
from memloc.datasets import Data
from memloc.recipes import Settings
from memloc.training import train

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="run the suite on this device (cpu or cuda)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def own_run_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the reader's trainings."""
    store = tmp_path / "runs"
    monkeypatch.setenv("MEMLOC_RUNS", str(store))
    return store


@pytest.fixture(autouse=True)
def own_global_generator() -> Iterator[None]:
    """Tests that build a torch module by hand get the same weights whatever ran before them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def global_generator_untouched() -> Iterator[None]:
    """The test neither draws from torch's global generator nor seeds it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


@pytest.fixture(scope="session")
def tiny(device: torch.device) -> Data:
    """64 digits of 8×8 pixels, a quarter of them with wrong labels, and 500 to test."""
    return labelnoise.apply(datasets.load("digits", examples=64), "flip", 0.25, seed=0).to(device)


@pytest.fixture(scope="session")
def trained(tiny: Data) -> nn.Module:
    """A network of 36 channels that has memorized the wrong labels."""
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    train(model, tiny, Settings(epochs=25, batch_size=16, learning_rate=0.1))
    return model


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets, in torchvision's layout."""
    folder = os.environ.get("MEMLOC_DATA")
    if not folder:
        pytest.skip("MEMLOC_DATA is not set: tests on MNIST and CIFAR need the real files")
    return Path(folder)


class SmallBook:
    """A book of a few small chapters in a folder of its own."""

    HEADER = "---\nkernelspec:\n  name: python3\n  display_name: Python 3\n  language: python\n---\n\n"

    def __init__(self, root: Path):
        self.root = root
        (root / "book").mkdir(parents=True)
        self.pages: list[str] = []
        self.write("intro", "# What is it?\n")

    def write(self, name: str, text: str) -> Path:
        """Write a page and put it into the table of contents."""
        if name not in self.pages:
            self.pages.append(name)
        first, *others = self.pages
        lines = ["format: jb-book", f"root: book/{first}", "chapters:" if others else ""]
        (self.root / "_toc.yml").write_text("\n".join([*lines, *(f"- file: book/{page}" for page in others)]))
        path = self.root / "book" / f"{name}.md"
        path.write_text(text)
        return path

    def chapter(self, name: str, *cells: str, parameters: str | None = "seed: int = 0  # the first seed") -> Path:
        """Write a chapter with these code cells after its parameters."""
        text = f"{self.HEADER}# The {name} chapter\n"
        if parameters is not None:
            text += f"\n```{{code-cell}} ipython3\n:tags: [parameters]\n\n{parameters}\n```\n"
        return self.write(name, text + "".join(f"\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells))

    def preset(self, chapter: str, name: str, text: str) -> Path:
        path = self.root / "book" / "presets" / chapter / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def history(own_run_store: Path) -> Callable[[str], list[dict]]:
    """Reads what a training, whole or still at work, has written of its epochs."""

    def read(address: str) -> list[dict]:
        for name in (f"{address}.partial", address):
            path = own_run_store / name / "history.json"
            if path.is_file():
                return json.loads(path.read_text())["rows"]
        return []

    return read


@pytest.fixture
def small_book(tmp_path: Path) -> SmallBook:
    return SmallBook(tmp_path / "project")
