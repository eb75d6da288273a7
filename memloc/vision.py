"""torchvision, also where its compiled operators cannot load.

PyPI's Linux wheel of torchvision is linked against the CUDA build of torch. Beside a CPU-only torch its
compiled part does not load, and ``import torchvision`` ends with "operator torchvision::nms does not exist",
because it registers a fake kernel for an operator that nobody defined. Declaring the two operators first is
enough: data sets, transforms, models and feature extraction are plain Python. ``ops.nms``, ``ops.roi_align``
and the image decoders of ``torchvision.io`` stay unavailable there.
"""

import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # a Library takes its operators back when it is collected


def torchvision() -> ModuleType:
    """Import torchvision, declaring its operators first where the compiled ones cannot load.

    The import takes about a second, so call it inside the function that needs it. Code that imports
    torchvision itself works as well once this has been called.

    Returns:
        The module :mod:`torchvision`, the same object at every call.

    Raises:
        ImportError: If torchvision is not installed.

    Example:
        >>> torchvision().datasets.KMNIST.__name__
        'KMNIST'
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")
