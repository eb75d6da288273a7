import importlib
import sys
from types import ModuleType

import pytest
import torch

from memloc import vision


def test_every_call_gives_the_same_module():
    assert vision.torchvision() is vision.torchvision() is sys.modules["torchvision"]


def test_models_and_data_sets_work_after_it():
    torchvision = vision.torchvision()
    network = torchvision.models.shufflenet_v2_x0_5
    assert callable(network)
    assert issubclass(torchvision.datasets.CIFAR100, torch.utils.data.Dataset)


def test_half_imported_modules_are_dropped_and_the_operators_declared_before_the_second_try(monkeypatch):
    whole, other = ModuleType("torchvision"), ModuleType("torchvisionary")
    broken = ModuleType("torchvision.broken")
    modules = {"torchvision.broken": broken, "torchvisionary": other}
    attempts = []

    def import_module(name: str) -> ModuleType:
        attempts.append(dict(modules))
        if len(attempts) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        return whole

    vision.torchvision()  # the real one first, so that nothing below is lasting
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(sys, "modules", modules)
    assert vision.torchvision() is whole
    assert attempts == [{"torchvision.broken": broken, "torchvisionary": other}, {"torchvisionary": other}]
    assert hasattr(torch.ops.torchvision, "nms")


def test_any_other_failure_of_the_import_is_shown(monkeypatch):
    def import_module(name: str) -> ModuleType:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(RuntimeError, match="out of memory"):
        vision.torchvision()
