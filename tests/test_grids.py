import json
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memloc import cli, grids
from memloc.grids import Cell, Resources
from memloc.pages import ProjectError
from memloc.parameters import ParameterError

PARAMETERS = """\
seed: int = 0  # the first seed
noise_rate: float = 0.1  # share
dataset: str = "digits"  # images
widths: str = "8,16"  # several
size: int = None  # pixels"""


@pytest.fixture
def book(small_book, monkeypatch):
    small_book.chapter("rewinding", "print(seed)", parameters=PARAMETERS)
    small_book.preset("rewinding", "small", "noise_rate: 0.2\n")
    monkeypatch.chdir(small_book.root)
    return small_book


def spec(book, content) -> Path:
    path = book.root / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_words_give_every_combination_and_commas_belong_to_values_that_are_lists(book):
    cells = grids.from_words("rewinding", ["seed=0,1", "dataset=mnist,cifar10", "widths=4,8", "widths=16"], book.root)
    found = [(cell.full["seed"], cell.full["dataset"], cell.full["widths"]) for cell in cells]
    assert found == [(s, d, w) for s in (0, 1) for d in ("mnist", "cifar10") for w in ("4,8", "16")]
    assert len({cell.address for cell in cells}) == 8


def test_a_file_takes_presets_and_grids_and_every_cell_once(book):
    blocks = [
        {"chapter": "rewinding", "preset": "small", "grid": {"seed": [0, 1, 0]}, "memory_gb": 1.5},
        {"chapter": "rewinding", "grid": {"noise_rate": [0.2, 0.3]}},
        {"training": {"epochs": 2, "noise_rate": 0}, "grid": {"model": ["mlp", "small_cnn"]}, "cpus": 2},
    ]
    cells = grids.read_spec(spec(book, {"cells": blocks}), book.root)
    assert [cell.chapter for cell in cells] == ["rewinding"] * 3 + [None] * 2
    assert [cell.full["noise_rate"] for cell in cells[:3]] == [0.2, 0.2, 0.3]
    assert [cell.preset for cell in cells[:3]] == ["small", "small", None]
    assert cells[0].resources == Resources(memory_gb=1.5)
    assert cells[3].resources == Resources(cpus=2)


def test_the_address_of_a_training_is_its_run_s(book):
    from memloc.recipes import Recipe

    (cell,) = grids.read_spec(spec(book, {"cells": [{"training": {"epochs": 2, "model": "mlp"}}]}), book.root)
    assert cell.address == Recipe(epochs=2, model="mlp").address


def test_an_address_changes_with_parameters_and_text_but_not_with_resources(book):
    def address(words=(), **more):
        return grids.from_words("rewinding", list(words), book.root, Resources(**more))[0].address

    first = address()
    assert address(["seed=0"]) == first == address(cpus=2)
    assert address(["seed=1"]) != first
    page = book.root / "book" / "rewinding.md"
    page.write_text(page.read_text() + "\nMore.\n")
    assert address() != first


def test_a_cell_survives_the_way_to_another_process(book):
    (cell,) = grids.from_words("rewinding", ["seed=3"], book.root, Resources(gpus=0.5))
    again = Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert (again, again.address) == (cell, cell.address)


def test_the_command_of_a_cell_runs_it_alone(book, capsys):
    (cell,) = grids.from_words("rewinding", ["dataset=mnist", "size=none", "widths=4,8"], book.root)
    assert cell.command() == "memloc run rewinding -p dataset=mnist -p widths=4,8"
    (faster,) = grids.from_words("rewinding", [], book.root, Resources(cpus=2))
    assert faster.command() == "memloc run rewinding --threads 2"
    (training,) = grids.read_spec(spec(book, {"cells": [{"training": {"epochs": 2}}]}), book.root)
    words = shlex.split(training.command("grid.yaml"))
    assert words[:3] == ["memloc", "sweep", "grid.yaml"]
    assert cli.main([*words[1:], "--dry-run"]) == 0
    assert "1 cells: 0 done already, 1 to do" in capsys.readouterr().out


def test_a_thousand_cells_expand_without_torch(book):
    words = ["seed=" + ",".join(map(str, range(100))), "noise_rate=" + ",".join(f"0.{n}" for n in range(10))]
    assert len(grids.from_words("rewinding", words, book.root)) == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cells: [", "is not YAML"),
        ("- 1", "must hold one key, cells"),
        ({"cells": []}, "there is nothing to run"),
        ({"cells": [], "more": 1}, "must hold one key, cells"),
        ({"cells": [7]}, "block 1 of .*: a block must be a mapping with either chapter or training"),
        ({"cells": [{"chapter": "rewinding", "training": {}}]}, "either chapter or training"),
        ({"cells": [{"chapter": "rewindin"}]}, "unknown chapter 'rewindin'; did you mean 'rewinding'"),
        ({"cells": [{"chapter": "../secrets"}]}, "chapter must be a name of letters"),
        ({"cells": [{"chapter": "rewinding", "preset": "../../secrets"}]}, "preset must be a name of letters"),
        ({"cells": [{"chapter": "rewinding", "preset": "big"}]}, "no preset 'big'"),
        ({"cells": [{"chapter": "rewinding", "gird": {}}]}, "unknown key 'gird'; did you mean 'grid'"),
        ({"cells": [{"chapter": "rewinding", "grid": {"sede": [1]}}]}, "unknown parameter 'sede'"),
        ({"cells": [{"chapter": "rewinding", "grid": {"seed": []}}]}, "grid must have a value for 'seed'"),
        ({"cells": [{"chapter": "rewinding", "grid": {"seed": ["one"]}}]}, "seed must be an int, got 'one'"),
        ({"cells": [{"chapter": "rewinding", "grid": [1]}]}, "grid must be a mapping of names, got list"),
        ({"cells": [{"chapter": "rewinding", "cpus": 0}]}, "cpus must be an integer from 1"),
        ({"cells": [{"chapter": "rewinding", "gpus": 1.5}]}, "gpus must be a whole number above 1"),
        ({"cells": [{"chapter": "rewinding", "memory_gb": "lots"}]}, "memory_gb must be a number"),
        ({"cells": [{"training": {"epoch": 3}}]}, "unknown field 'epoch' of a training; did you mean 'epochs'"),
        ({"cells": [{"training": {"epochs": -3}}]}, "epochs must be an integer"),
        ({"cells": [{"training": {}, "grid": {"processes": [1, 2]}}]}, "processes must be 1 in a sweep"),
        ({"cells": [{"training": {}, "preset": "small"}]}, "preset belongs to a chapter"),
        ("cells: []\ncells: [{chapter: rewinding}]", "key 'cells' is given twice"),
        ("cells: [{chapter: rewinding, grid: {seed: [0], seed: [1]}}]", "key 'seed' is given twice"),
        ({"cells": [{"chapter": "rewinding", "grid": {"a\nb": []}}]}, r"grid must have a value for 'a\\nb'"),
        (
            {"cells": [{"chapter": "rewinding", "grid": {"noise_rate": [10**400]}}]},
            "'noise_rate' must be an integer",
        ),
        ("cells: [{chapter: rewinding, cpus: 0x" + "f" * 9000 + "}]", "'cpus' must be an integer of 64 bits"),
        ("cells: [{training: {epochs: 0x" + "f" * 9000 + "}}]", "'epochs' must be an integer of 64 bits"),
        ({"cells": [{"training": {"epochs": [[1]]}}]}, "'epochs' must be one value, got a list"),
        ({"cells": [{"chapter": "rewinding", "grid": {"seed": [[1]]}}]}, "'seed' must be one value, got a list"),
        ('cells: [{training: {dropout_places: "\\ud800"}}]', "'dropout_places' must be a text that can be printed"),
        ('cells: [{training: {}, grid: {dropout_places: [a, "\\e[2J"]}}]', "'dropout_places' must be a text"),
        (
            {"cells": [{"chapter": "rewinding", "grid": {"seed": list(range(400)), "noise_rate": [0.1] * 300}}]},
            "a grid must have at most 100,000 cells, got 120,000",
        ),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_in_one_line(book, content, message):
    with pytest.raises((ProjectError, ParameterError), match=message) as refused:
        grids.read_spec(spec(book, content), book.root)
    assert "\n" not in str(refused.value)


def test_aliases_and_merges_are_read_but_cannot_grow_without_end(book):
    content = "cells: [&a {chapter: rewinding, cpus: 2}, {<<: *a, cpus: 3, grid: {seed: 1}}]"
    assert [cell.resources.cpus for cell in grids.read_spec(spec(book, content), book.root)] == [2, 3]
    bomb = "cells:\n- &a0 {chapter: rewinding}\n"
    bomb += "".join(f"- &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    with pytest.raises(ProjectError, match="too many keys are merged"):
        grids.read_spec(spec(book, bomb), book.root)
    laughs = "cells: [{chapter: rewinding, cpus: [&a0 [1]"
    laughs += "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)) + "]}]"
    with pytest.raises(ParameterError, match="'cpus' must be one value, got a list"):
        grids.read_spec(spec(book, laughs), book.root)


@pytest.mark.parametrize("value", ["a\x1b[2J", "a\nb", "\udcff"])
def test_what_a_terminal_would_obey_or_cannot_show_is_refused(book, value):
    with pytest.raises(ParameterError, match="'dataset' must be a text that can be printed"):
        grids.from_words("rewinding", [f"dataset={value}"], book.root)


def test_too_many_blocks_are_refused_as_soon_as_they_are_too_many(book, monkeypatch):
    monkeypatch.setattr(grids, "MOST_CELLS", 3)
    content = "cells: [&a {chapter: rewinding, grid: {seed: [0, 1]}}, *a, {chapter: nothing}]"
    with pytest.raises(ParameterError, match="a sweep must have at most 3 cells, got at least 4"):
        grids.read_spec(spec(book, content), book.root)


def test_a_file_that_is_not_there_or_no_text_is_refused(book):
    with pytest.raises(ProjectError, match="cannot be read"):
        grids.read_spec(book.root / "none.yaml", book.root)
    (book.root / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ProjectError, match=r"cannot be read|is not YAML"):
        grids.read_spec(book.root / "bytes.yaml", book.root)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
BLOCKS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("chapter", "training", "preset", "grid", "cpus", "gpus", "memory_gb"), ANYTHING)
    | {"chapter": st.just("rewinding"), "grid": st.dictionaries(st.sampled_from(["seed", "size", "widths"]), ANYTHING)},
)
FUZZ = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def refused_or_cells(call):
    """Either good cells come out, or one line of ours."""
    lines = [""]
    try:
        assert all(isinstance(cell, Cell) for cell in call())
    except (ProjectError, ParameterError) as error:
        lines = str(error).splitlines()
    assert len(lines) == 1, lines


@pytest.mark.slow
@FUZZ
@given(st.one_of(st.text(), st.lists(BLOCKS, max_size=3).map(lambda blocks: yaml.safe_dump({"cells": blocks}))))
def test_whatever_is_in_a_file_it_gives_cells_or_one_line(book, content):
    (book.root / "fuzz.yaml").write_text(content, errors="surrogatepass")
    refused_or_cells(lambda: grids.read_spec(book.root / "fuzz.yaml", book.root))


@pytest.mark.slow
@FUZZ
@given(st.lists(st.text() | st.tuples(st.sampled_from(["seed", "size", "widths", "dataset"]), st.text()).map("=".join)))
def test_whatever_is_typed_gives_cells_or_one_line(book, words):
    refused_or_cells(lambda: grids.from_words("rewinding", words, book.root))
