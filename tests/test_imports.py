"""Who imports whom inside the package, read from the source."""

import ast
import graphlib
from pathlib import Path

import memloc

PACKAGE = Path(memloc.__file__).parent
METHODS = {"gradients", "early_gradients", "rewinding", "retraining", "flipping", "influence", "leave_one_out"}
LOSSES = {"mat", "twins", "pairs"}  # methods that are ways to train: fit() takes recipes with them


def imported(path):
    """The modules of the package that a module imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memloc"):
            module = node.module.partition(".")[2]
            names |= {module} if module else {alias.name for alias in node.names}
    return names


IMPORTS = {path.stem: imported(path) for path in PACKAGE.glob("*.py")}


def test_any_module_can_be_imported_first():
    """In the reference code the module of dropout cannot."""
    assert IMPORTS["models"] >= {"dropout", "vit"}
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # a cycle raises


def test_what_is_a_loss_knows_nothing_of_the_training_that_follows_it():
    for module in LOSSES:
        assert "training" not in IMPORTS[module], module
    assert IMPORTS["training"] >= {"mat", "pairs"}


def test_methods_do_not_import_each_other_and_nothing_below_imports_one():
    for module, names in IMPORTS.items():
        assert not names & METHODS, module
