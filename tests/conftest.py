"""What every test shares: the device, a run store of its own, and data outside the repository."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
def real_data() -> Path:
    """The folder with the real data sets, in torchvision's layout."""
    folder = os.environ.get("MEMLOC_DATA")
    if not folder:
        pytest.skip("MEMLOC_DATA is not set: tests on MNIST and CIFAR need the real files")
    return Path(folder)
