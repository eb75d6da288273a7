import pytest

from memloc import pages
from memloc.pages import ProjectError
from memloc.parameters import ParameterError


def refusal(call, *arguments) -> str:
    with pytest.raises(ProjectError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_root_is_found_from_a_folder_below(small_book):
    assert pages.project_root(small_book.root / "book") == small_book.root


def test_without_a_start_the_working_folder_is_searched_first(small_book, monkeypatch):
    monkeypatch.chdir(small_book.root / "book")
    assert pages.project_root() == small_book.root


def test_from_elsewhere_the_clone_that_is_installed_is_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (pages.project_root() / "memloc" / "pages.py").is_file()


def test_a_folder_outside_any_book_is_refused(tmp_path):
    assert "no _toc.yml in" in refusal(pages.project_root, tmp_path)


def test_pages_come_in_the_order_of_a_nested_table_of_contents(small_book):
    (small_book.root / "_toc.yml").write_text(
        "root: book/a\nparts:\n- caption: x\n  chapters:\n  - file: book/b\n    sections:\n    - file: book/c\n"
        "- chapters:\n  - file: book/d\n"
    )
    assert pages.pages(small_book.root) == ["book/a", "book/b", "book/c", "book/d"]


@pytest.mark.parametrize("text", ["", "- a\n", "parts: []\n", "root: [\n"])
def test_a_broken_table_of_contents_is_refused(small_book, text):
    (small_book.root / "_toc.yml").write_text(text)
    assert "_toc.yml" in refusal(pages.pages, small_book.root)


def test_a_chapter_is_a_page_with_a_kernel(small_book):
    path = small_book.chapter("training", parameters="epochs: int = 20  # passes\nseed: int = 0  # first seed")
    (found,) = pages.find(small_book.root).values()
    assert found == pages.Chapter("training", path, "The training chapter", {"epochs": 20, "seed": 0})


def test_a_chapter_without_a_parameters_cell_has_none(small_book):
    small_book.chapter("training", parameters=None)
    assert pages.find(small_book.root)["training"].parameters == {}


def test_a_comment_in_a_cell_is_no_title(small_book):
    cell = "```{code-cell} ipython3\n# a comment\n```\n"
    small_book.write("training", f"{small_book.HEADER}{cell}# What is memorized?\n")
    assert pages.find(small_book.root)["training"].title == "What is memorized?"


def test_the_parameters_tag_is_found_in_a_yaml_block_among_other_options(small_book):
    options = "tags: [hide-input, parameters]\nother: 1"
    cell = f"```{{code-cell}} ipython3\n---\n{options}\n---\nseed: int = 4  # first seed\n```\n"
    small_book.write("training", small_book.HEADER + cell)
    assert pages.find(small_book.root)["training"].parameters == {"seed": 4}


def test_a_page_of_the_table_that_is_not_there_is_named(small_book):
    small_book.chapter("training").unlink()
    assert refusal(pages.find, small_book.root).startswith("book/training.md is in _toc.yml but not in ")


def test_two_parameters_cells_are_refused(small_book):
    path = small_book.chapter("training")
    path.write_text(path.read_text() + "\n```{code-cell}\n:tags: [parameters]\nseed: int = 1  # again\n```\n")
    assert "has 2 cells tagged parameters" in refusal(pages.find, small_book.root)


def test_a_parameters_cell_that_is_not_typed_literals_is_refused(small_book):
    small_book.chapter("training", parameters="seed = 0")
    with pytest.raises(ParameterError, match="chapter 'training'"):
        pages.find(small_book.root)


def test_an_unknown_chapter_is_refused_with_the_nearest(small_book):
    small_book.chapter("rewinding")
    assert refusal(pages.get, small_book.root, "rewindin") == (
        "unknown chapter 'rewindin': did you mean 'rewinding'? (memloc list shows all)"
    )


def test_a_preset_is_read_by_name_and_by_path(small_book, tmp_path):
    path = small_book.preset("training", "small", "epochs: 3\n")
    assert pages.read_preset(small_book.root, "training", "small") == {"epochs": 3}
    assert pages.read_preset(small_book.root, "training", str(path)) == {"epochs": 3}


@pytest.mark.parametrize("text", ["", "- 3\n", "epochs\n", "a: [\n", "!!python/object/apply:os.getpid []\n"])
def test_a_preset_that_is_no_mapping_is_refused(small_book, text):
    small_book.preset("training", "small", text)
    assert "preset small" in refusal(pages.read_preset, small_book.root, "training", "small")


def test_a_preset_that_is_not_there_is_refused_with_the_nearest_or_all(small_book):
    small_book.preset("training", "mnist", "epochs: 3\n")
    near = refusal(pages.read_preset, small_book.root, "training", "mnst")
    assert near == "no preset 'mnst' of chapter 'training'; did you mean 'mnist'?"
    assert refusal(pages.read_preset, small_book.root, "training", "zzz").endswith("; there are: mnist")
