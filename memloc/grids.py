"""Grids of chapters and trainings: read from a file or a command, expanded into cells, checked before one starts."""

import hashlib
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import parameters
from memloc.pages import Chapter, ProjectError, find, get, read_preset
from memloc.parameters import PARAMETERS, ParameterError, Value, as_word, did_you_mean
from memloc.records import module_sha256

if TYPE_CHECKING:
    import yaml

__all__ = ["MOST_CELLS", "Cell", "Resources", "from_words", "is_current", "read_spec"]

MOST_CELLS = 100_000
"""A grid of more cells is refused: it is a slip of the pen."""

_MOST_KEYS = 1000  # of a mapping in a file, with those that it merges

_BLOCK = ("chapter", "training", "preset", "grid", "cpus", "gpus", "memory_gb")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Resources:
    """What one cell may use.

    Attributes:
        cpus: Threads, a whole number.
        gpus: GPUs, a fraction where several cells share one; None takes a quarter where there is a GPU and the cell's
            device is ``"auto"`` or ``"cuda"``, else none.
        memory_gb: Memory of all processes of the cell together, in gigabytes; a cell that takes more is ended.

    Raises:
        ParameterError: If a value is out of range.

    Example:
        >>> Resources(gpus=0.5)
        Resources(cpus=1, gpus=0.5, memory_gb=4.0)
    """

    cpus: int = 1
    gpus: float | None = None
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if not isinstance(self.cpus, int) or isinstance(self.cpus, bool) or not 1 <= self.cpus <= 1024:
            raise ParameterError(f"cpus must be an integer from 1 to 1024, got {self.cpus!r}")
        for name, least, most in (("gpus", 0, 64), ("memory_gb", 0.1, 1e5)):
            value = getattr(self, name)
            if name == "gpus" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
                raise ParameterError(f"{name} must be a number from {least} to {most:g}, got {value!r}")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ParameterError(f"gpus must be a whole number above 1, got {self.gpus!r}")


@dataclass(frozen=True)
class Cell:
    """One execution of a chapter, or one training.

    Attributes:
        chapter: The chapter's name; None for a training.
        values: What differs from the chapter's own parameters or from the recipe's defaults.
        full: All parameters of the chapter; of a training the same as ``values``.
        preset: The preset that some of the values are from; None for none.
        resources: What it may use.
        address: A name that no other cell has: the training's own, or a hash of the chapter's text, its module and
            all parameters.
    """

    chapter: str | None
    values: dict[str, Value]
    full: dict[str, Value]
    preset: str | None
    resources: Resources
    address: str = field(compare=False)

    @property
    def name(self) -> str:
        """What a table calls it."""
        return self.chapter or "training"

    @property
    def device(self) -> str:
        """Where it wants to compute."""
        return str(self.full.get("device", "auto" if self.chapter is None else "cpu"))

    def command(self, spec: str | None = None) -> str:
        """Say what to type to run this cell alone, without Ray.

        Args:
            spec: The file that the cell is from, if there is one.
        """
        if self.chapter is not None:
            threads = self.resources.cpus
            words = ["memloc", "run", self.chapter, *(["--threads", str(threads)] if threads > 1 else [])]
            for name, value in self.values.items():
                words += ["-p", f"{name}={as_word(value)}"]
            return shlex.join(words)
        return shlex.join(["memloc", "sweep", spec or "SPEC.yaml", "--cell", self.address])

    def to_json(self) -> dict[str, Any]:
        """Turn into JSON values, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Cell":
        """Make a cell again out of what :meth:`to_json` gave."""
        return cls(**{**content, "resources": Resources(**content["resources"])})


def read_spec(path: Path, root: Path) -> list[Cell]:
    """Read a file of grids.

    Its one key ``cells`` holds blocks. Each names a ``chapter``, with a ``preset`` if wanted, or gives the values of a
    ``training`` (fields of :class:`memloc.recipes.Recipe`). ``grid`` gives for some parameters a list of values, of
    which every combination is a cell; ``cpus``, ``gpus`` and ``memory_gb`` say what each cell may use::

        cells:
          - chapter: rewinding
            preset: mnist-10k
            grid: {seed: [0, 1, 2], noise_rate: [0.1, 0.2]}
            memory_gb: 3

    Args:
        path: A YAML file.
        root: The folder with ``_toc.yml``.

    Returns:
        The cells, in the order of the file, each once.

    Raises:
        ProjectError: If the file is not there, is not YAML or does not have this form.
        ParameterError: If a value is refused.
    """
    import yaml

    try:
        content = yaml.load(path.read_text(), _loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ProjectError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProjectError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or set(content) != {"cells"} or not isinstance(content["cells"], list):
        raise ProjectError(f"{path} must hold one key, cells, with a list of blocks")
    known, cells = find(root), []
    for number, block in enumerate(content["cells"], 1):
        try:
            cells += _expand_block(block, known, root)
        except (ParameterError, ProjectError) as error:
            raise type(error)(f"block {number} of {path}: {error}") from error
        _check_size(cells)
    return _each_once(cells)


def from_words(name: str, words: Sequence[str], root: Path, resources: Resources | None = None) -> list[Cell]:
    """Expand what was typed: ``rewinding -p seed=0,1,2 -p dataset=mnist,cifar10``.

    Args:
        name: The chapter's name.
        words: ``NAME=VALUE`` or ``NAME=VALUE,VALUE``. Of a parameter that is itself a list, such as ``widths``, a comma
            is part of the value; a name given more than once has all the values.
        root: The folder with ``_toc.yml``.
        resources: What each cell may use; None takes the default.

    Returns:
        The cells, each once.

    Raises:
        ProjectError: If there is no such chapter.
        ParameterError: If a value is refused.
    """
    grid: dict[str, list[object]] = {}
    for word in words:
        parameter, equals, values = word.partition("=")
        if not equals:
            raise ParameterError(f"-p takes NAME=VALUE,VALUE, got {word!r}")
        _check_one_value(parameter, values)
        is_list = parameter in PARAMETERS and PARAMETERS[parameter].each is not None
        grid.setdefault(parameter, []).extend([values] if is_list else values.split(","))
    return _each_once(_expand_chapter(get(root, name), None, {}, grid, resources or Resources(), root))


def is_current(cell: Cell, root: Path) -> bool:
    """Say whether what a cell's address stands for is still what is on this machine's disk.

    Args:
        cell: The cell.
        root: The folder with ``_toc.yml``.

    Returns:
        False if the chapter's text, its module or a parameter's default is another than when the cell was made. A
        training is always current.

    Raises:
        ProjectError: If there is no such chapter any more.
        ParameterError: If the chapter has other parameters now.
    """
    if cell.chapter is None:
        return True
    (now,) = _expand_chapter(get(root, cell.chapter), cell.preset, cell.values, {}, cell.resources, root)
    return now.address == cell.address


def _loader() -> type["yaml.SafeLoader"]:
    """Make a reader of YAML that takes no key twice and merges no more than a person would write."""
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.flat: set[int] = set()  # where merged keys may come before a mapping's own

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = [key for key, times in Counter(keys).items() if times > 1]
            if twice and id(node) not in self.flat:
                raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
            super().flatten_mapping(node)
            self.flat.add(id(node))
            if len(node.value) > _MOST_KEYS:
                raise yaml.constructor.ConstructorError(None, None, "too many keys are merged", node.start_mark)

    return Loader


def _expand_block(block: object, known: Mapping[str, Chapter], root: Path) -> list[Cell]:
    """Expand one block of a file."""
    if not isinstance(block, dict) or ("chapter" in block) == ("training" in block):
        raise ProjectError("a block must be a mapping with either chapter or training")
    for key in ("chapter", "preset", "cpus", "gpus", "memory_gb"):
        _check_one_value(key, block.get(key))
    for key in block:
        if key not in _BLOCK:
            raise ProjectError(f"unknown key {key!r}{did_you_mean(str(key), _BLOCK)}")
    grid = _grid(block.get("grid", {}))
    resources = Resources(**{key: block[key] for key in ("cpus", "gpus", "memory_gb") if key in block})
    if "training" in block:
        if "preset" in block:
            raise ProjectError("preset belongs to a chapter, not to a training: write its values")
        return _expand_training(_named(block["training"], "training"), grid, resources)
    name, preset = block["chapter"], block.get("preset")
    for key, value in (("chapter", name), ("preset", preset)):
        if value is not None and (not isinstance(value, str) or not _NAME.fullmatch(value)):
            raise ProjectError(f"{key} must be a name of letters, digits and dashes, got {value!r}")
    if name not in known:
        raise ProjectError(f"unknown chapter {name!r}{did_you_mean(str(name), known)}")
    values = read_preset(root, name, preset) if preset else {}
    return _expand_chapter(known[name], preset, values, grid, resources, root)


def _named(values: object, what: str) -> dict[str, object]:
    """Check that something is a mapping of names."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ProjectError(f"{what} must be a mapping of names, got {type(values).__name__}")
    for name, value in values.items():
        for each in value if what == "grid" and isinstance(value, list) else [value]:
            _check_one_value(name, each)
    return values


def _check_one_value(name: str, value: object) -> None:
    """Refuse what no parameter takes and no message could quote: with aliases, a short list can be endless."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ParameterError(f"{name!r} must be an integer of 64 bits, got one of {value.bit_length()}")
    if isinstance(value, str) and not value.isprintable():
        raise ParameterError(f"{name!r} must be a text that can be printed, got {value!r}")
    if value is not None and not isinstance(value, bool | int | float | str | date):
        raise ParameterError(f"{name!r} must be one value, got a {type(value).__name__}")


def _grid(values: object) -> dict[str, list[object]]:
    """Check a grid; one value stands for a list of it."""
    lists = {name: each if isinstance(each, list) else [each] for name, each in _named(values, "grid").items()}
    for name, each in lists.items():
        if not each:
            raise ProjectError(f"grid must have a value for {name!r}, got none")
    return lists


def _combinations(grid: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Give every combination, the last name changing fastest."""
    size = math.prod(len(values) for values in grid.values())
    if size > MOST_CELLS:
        raise ParameterError(f"a grid must have at most {MOST_CELLS:,} cells, got {size:,}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _expand_chapter(
    chapter: Chapter,
    preset: str | None,
    values: Mapping[str, object],
    grid: Mapping[str, Sequence[object]],
    resources: Resources,
    root: Path,
) -> list[Cell]:
    text, module = hashlib.sha256(chapter.path.read_bytes()).hexdigest(), module_sha256(root, chapter.name)
    cells = []
    for chosen in _combinations(grid):
        full = parameters.check(chapter.name, chapter.parameters, {**values, **chosen})
        changed = {name: value for name, value in full.items() if value != chapter.parameters[name]}
        content = json.dumps([chapter.name, text, module, full], sort_keys=True)
        address = hashlib.sha256(content.encode()).hexdigest()[:16]
        cells.append(Cell(chapter.name, changed, full, preset, resources, address))
    return cells


def _expand_training(
    values: Mapping[str, object], grid: Mapping[str, Sequence[object]], resources: Resources
) -> list[Cell]:
    from memloc.recipes import Recipe

    cells = []
    for chosen in _combinations(grid):
        given: dict[str, Any] = {**values, **chosen}
        for name in given:
            if name not in Recipe.__dataclass_fields__:
                near = did_you_mean(name, Recipe.__dataclass_fields__)
                raise ParameterError(f"unknown field {name!r} of a training{near}")
        try:
            recipe = Recipe(**given)
        except (TypeError, ValueError) as error:
            raise ParameterError(str(error)) from error
        if recipe.processes > 1:
            raise ParameterError(f"processes must be 1 in a sweep, which starts no torchrun, got {recipe.processes}")
        cells.append(Cell(None, given, given, None, resources, recipe.address))
    return cells


def _check_size(cells: Sequence[Cell]) -> None:
    """Refuse too many cells, after each block: aliases make many blocks of one."""
    if len(cells) > MOST_CELLS:
        raise ParameterError(f"a sweep must have at most {MOST_CELLS:,} cells, got at least {len(cells):,}")


def _each_once(cells: Sequence[Cell]) -> list[Cell]:
    """Leave out cells that came before."""
    if not cells:
        raise ProjectError("there is nothing to run: give at least one block with a chapter or a training")
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.address, cell)
    return list(first.values())
