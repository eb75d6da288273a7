"""The book: it is built from executed chapters, says what was measured, and nothing broken gets into it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import SmallBook

from memloc import book, chapters, notebooks, staging

ROOT = Path(__file__).parents[1]
CHAPTERS = chapters.find(ROOT)
URL = "https://github.com/somebody/somewhere"

PLOT = """:tags: [hide-input]

import matplotlib.pyplot as plt

from memloc.chapters import glue

with open("executions.txt", "a") as log:
    log.write("{name}\\n")
figure, axes = plt.subplots(figsize=(3, 2))
axes.plot([0, {bend}, 1])
glue("curve", figure)
glue("best", "0.99")"""

RECORD = """:tags: [remove-cell]

from memloc.chapters import record

record({{"claim": "Clean first | noisy later.", "paper": "noisy examples come last", "verdict": "{verdict}"}})"""

TEXT = """
```{{glue:figure}} curve
:name: {name}-curve
:alt: {alt}

Accuracy after each epoch.
```

The best is {{glue:text}}`best`, see {{numref}}`{name}-curve` {{cite:p}}`maini2023`.
"""

SENTENCE = "Line plot of accuracy against epoch, rising to one."

# Two groups that can run side by side: these, which share the project built below, and nbval's.
pytestmark = pytest.mark.xdist_group("book")


def write_chapter(project: SmallBook, name: str, bend: float, verdict: str = "holds", alt: str = SENTENCE) -> None:
    parameters = 'dataset: str = "digits"  # the images\nseed: int = 0  # the first seed'
    cells = [PLOT.format(name=name, bend=bend), RECORD.format(verdict=verdict)]
    path = project.chapter(name, *cells, parameters=parameters)
    path.write_text(path.read_text() + TEXT.format(name=name, alt=alt))
    project.preset(name, "smallest", "seed: 3\n")


def make_project(folder: Path) -> SmallBook:
    """Two small chapters among pages, settings and style of the real book."""
    project = SmallBook(folder)
    project.write("intro", "# Where?\n\n<!-- scoreboard -->\n\nSee [the first chapter](training.md).\n")
    write_chapter(project, "training", 0.7)
    write_chapter(project, "rewinding", 0.2, verdict="partly")
    for page in ("status", "references"):
        project.write(page, (ROOT / "book" / f"{page}.md").read_text())
    shutil.copy(ROOT / "_config.yml", folder)
    shutil.copy(ROOT / "book" / "references.bib", folder / "book")
    shutil.copytree(ROOT / "book" / "_static", folder / "book" / "_static")
    return project


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> SmallBook:
    project = make_project(tmp_path_factory.mktemp("built") / "project")
    book.build(project.root)
    return project


@pytest.fixture
def project(built: SmallBook, tmp_path: Path) -> SmallBook:
    """A copy of the built project, to break."""
    copied = make_project(tmp_path / "copy")
    shutil.copytree(built.root / "_build", copied.root / "_build")
    shutil.copy(built.root / "executions.txt", copied.root)
    return copied


def page(project: SmallBook, name: str) -> str:
    return (project.root / "_build" / "html" / "book" / f"{name}.html").read_text()


def executions(project: SmallBook) -> list[str]:
    return (project.root / "executions.txt").read_text().split()


def set_repository(project: SmallBook, url: str) -> None:
    config = project.root / "_config.yml"
    text = config.read_text()
    config.write_text(text.replace('url: ""', f'url: "{url}"'))
    assert config.read_text() != text


@pytest.mark.slow
def test_every_page_of_the_table_of_contents_is_built(built: SmallBook) -> None:
    assert book.missing(built.root / "_build" / "html", chapters.pages(built.root)) == []
    assert "book/intro.html" in (built.root / "_build" / "html" / "index.html").read_text()


@pytest.mark.slow
def test_numbers_and_figures_of_a_chapter_are_on_its_page(built: SmallBook) -> None:
    text = page(built, "training")
    assert "The best is 0.99, see Fig. 1" in re.sub("<[^>]*>", "", text)
    assert f'alt="{SENTENCE}"' in text


@pytest.mark.slow
def test_the_scoreboard_says_what_was_claimed_found_and_on_what(built: SmallBook) -> None:
    text = re.sub("<[^>]*>", "", page(built, "intro"))
    assert "Clean first | noisy later." in text
    assert "noisy examples come last" in text
    assert "holds: digits, 1 seed" in text
    assert "partly: digits, 1 seed" in text
    assert "not run yet" in text
    assert 'href="training.html"' in page(built, "intro")


@pytest.mark.slow
def test_the_status_page_says_when_where_and_with_what_the_chapters_ran(built: SmallBook) -> None:
    text = re.sub("<[^>]*>", " ", page(built, "status"))
    for chapter in chapters.find(built.root).values():
        (executed,) = (built.root / "_build" / "executed").glob(f"{chapter.name}-*.ipynb")
        about = json.loads(executed.read_text())["metadata"]["memloc"]
        assert all(str(about[key]) in text for key in ("seconds", "date", "device"))
        assert all(version in text for version in about["versions"].values())
    assert "jupyter-book" in text


@pytest.mark.slow
def test_nothing_published_names_a_folder_of_this_machine(built: SmallBook) -> None:
    private = [str(folder).encode() for folder in (built.root, ROOT, Path.home())]
    html = built.root / "_build" / "html"
    files = [path for path in html.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path.name for path in files if any(folder in path.read_bytes() for folder in private)] == []


@pytest.mark.slow
def test_only_the_part_of_mathjax_that_is_used_is_published(built: SmallBook) -> None:
    folder = built.root / "_build" / "html" / "_static" / "mathjax"
    assert (folder / "tex-chtml.js").is_file()
    assert {path.name for path in (folder / "output").iterdir()} == {"chtml"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3e6


@pytest.mark.slow
def test_the_downloaded_notebook_is_executed_and_reads_well_outside_the_book(built: SmallBook) -> None:
    html = built.root / "_build" / "html"
    link = re.search(r'href="([^"]*\.ipynb)"', page(built, "training"))
    assert link
    notebook = json.loads((html / "book" / link[1]).read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert [sorted(output["data"]) for output in outputs] == [["image/png", "text/plain"]]
    assert "The best is 0.99, see" in "".join("".join(cell["source"]) for cell in notebook["cells"])


@pytest.mark.slow
def test_an_unchanged_book_is_neither_executed_nor_rendered_again(built: SmallBook) -> None:
    stamp = built.root / "_build" / "html" / book.STAMP
    before, ran = stamp.stat().st_mtime_ns, executions(built)
    said: list[str] = []
    assert book.build(built.root, progress=said.append) == built.root / "_build" / "html" / "index.html"
    assert (stamp.stat().st_mtime_ns, executions(built)) == (before, ran)
    assert said[-1] == "book: nothing has changed"


@pytest.mark.slow
def test_a_change_of_one_chapter_executes_only_that_one(project: SmallBook) -> None:
    before = executions(project)
    write_chapter(project, "rewinding", 0.4, verdict="does not hold")
    book.build(project.root)
    assert executions(project) == [*before, "rewinding"]
    assert "does not hold" in page(project, "intro")


@pytest.mark.slow
def test_a_page_that_is_lost_is_rendered_again(project: SmallBook) -> None:
    before = executions(project)
    (project.root / "_build" / "html" / "book" / "status.html").unlink()
    book.build(project.root)
    assert page(project, "status")
    assert executions(project) == before


Break = Callable[[SmallBook], object]

BROKEN: dict[str, tuple[Break, str]] = {
    "a failing cell": (
        lambda project: project.chapter("rewinding", "1 / 0"),
        r"^book/rewinding\.md: .*ZeroDivisionError",
    ),
    "a reference to nothing": (
        lambda project: project.write("intro", "# Where?\n\nSee {ref}`nowhere`.\n"),
        r"^book/intro\.md:3: .*nowhere",
    ),
    "a source that is not in the bibliography": (
        lambda project: project.write("intro", "# Where?\n\nSee {cite:p}`nobody1900`.\n"),
        r"^book/intro\.md:3: .*nobody1900",
    ),
    "a number that nobody glued": (
        lambda project: project.chapter("rewinding", "1").write_text(
            SmallBook.HEADER + "# Rewinding\n\nIt is {glue:text}`unknown`.\n"
        ),
        r"^book/rewinding\.md \(cell 1\): .*unknown",
    ),
    "a figure with nothing to read": (
        lambda project: write_chapter(project, "rewinding", 0.2, alt=""),
        r"^book/rewinding\.md: figure rewinding-curve needs a sentence",
    ),
    "a verdict on nothing": (
        lambda project: project.chapter(
            "rewinding", 'from memloc.chapters import record\n\nrecord({"verdict": "holds", "paper": "it does"})'
        ),
        r"^book/rewinding\.md records a verdict but no claim",
    ),
    "an address that Colab cannot open": (
        lambda project: set_repository(project, "https://gitlab.com/somebody/somewhere"),
        r"^_config\.yml: repository\.url must be https://github\.com/OWNER/NAME or empty, got 'https://gitlab",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_whatever_is_broken_breaks_the_build_and_is_named(project: SmallBook, break_it: Break, message: str) -> None:
    break_it(project)
    with pytest.raises(book.BookError, match=message) as caught:
        book.build(project.root)
    assert "\n" not in str(caught.value)
    assert not (project.root / "_build" / "html").exists()


@pytest.mark.slow
def test_every_failing_chapter_is_named_with_its_traceback(project: SmallBook) -> None:
    project.chapter("training", "1 / 0")
    project.chapter("rewinding", "{}['nothing']")
    with pytest.raises(book.BookError, match=r"^2 chapters failed; the first: book/training\.md") as caught:
        book.build(project.root)
    assert "ZeroDivisionError" in "".join(caught.value.details)
    assert "KeyError" in "".join(caught.value.details)


@pytest.mark.slow
def test_an_interrupted_build_ends_its_kernels(small_book: SmallBook) -> None:
    waiting = "import os, pathlib, time\npathlib.Path(f'kernel-{os.getpid()}').touch()\ntime.sleep(100)"
    for name in ("training", "rewinding"):
        small_book.chapter(name, waiting)
    command = [sys.executable, "-c", "import sys; from memloc.cli import main; sys.exit(main(['build']))"]
    build = subprocess.Popen(command, cwd=small_book.root, start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: len(kernels(small_book)) == 2)
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    assert build.wait(timeout=30) == 130
    until(lambda: not any(is_alive(kernel) for kernel in kernels(small_book)))
    assert list((small_book.root / "_build" / "executed").glob("*[0-9a-f].ipynb")) == []


def kernels(project: SmallBook) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in project.root.glob("kernel-*")]


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.1)


def test_a_page_that_is_not_there_is_named(small_book: SmallBook) -> None:
    small_book.write("nothing", "").unlink()
    with pytest.raises(chapters.ProjectError, match=r"book/nothing\.md is in _toc\.yml"):
        book.build(small_book.root)


@pytest.mark.parametrize("alt", ["", "../_images/5f3a.png", "a line plot"])
def test_an_image_without_a_sentence_is_found_wherever_it_is_in_the_article(tmp_path: Path, alt: str) -> None:
    image = f'<img src="x.png" alt="{alt}">'
    (tmp_path / "one.html").write_text(f'<img src="logo.png"><article><figure id="a">{image}</figure></article>')
    (line,) = book.figures_without_a_sentence(tmp_path, "one")
    assert line.startswith("one.md: figure a needs a sentence")


@pytest.mark.slow
def test_there_are_no_buttons_to_open_a_notebook_elsewhere_without_a_repository(built: SmallBook) -> None:
    text = page(built, "training")
    assert not re.search(r"colab\.research|mybinder|github\.com", text)


@pytest.mark.slow
def test_with_a_repository_the_buttons_open_its_generated_notebooks(project: SmallBook) -> None:
    set_repository(project, URL)
    book.build(project.root)
    text = page(project, "rewinding")
    path = "somebody/somewhere/blob/notebooks/book/rewinding.ipynb"
    assert f'href="https://colab.research.google.com/github/{path}"' in text
    assert (
        'href="https://mybinder.org/v2/gh/somebody/somewhere/notebooks?urlpath=lab/tree/book/rewinding.ipynb"' in text
    )
    assert f'href="{URL}"' in text
    first = json.loads((project.root / "_build" / "notebooks" / "rewinding.ipynb").read_text())["cells"][0]
    assert f"memloc @ git+{URL}" in "".join(first["source"])


@pytest.mark.slow
def test_stock_papermill_runs_a_notebook_for_readers(built: SmallBook, tmp_path: Path) -> None:
    notebook = built.root / "_build" / "notebooks" / "training.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, "out.ipynb", "-p", "seed", "5", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed = 5" in (tmp_path / "out.ipynb").read_text()


# Of the chapters as written, on digits.
VERDICTS = {
    "training": "holds",
    "rewinding": "partly",
    "rollback": "does not hold",
    "gradients": "holds",
    "manifolds": "partly",
    "double_descent": "partly",
    "early_gradients": "partly",
    "retraining": "holds",
    "flipping": "holds",
    "dropout": "partly",
    "where": "partly",
    "natural": "partly",
    "spurious": "partly",
    "good_bad_ugly": "partly",
    "mat": "holds",
    "influence": "partly",
    "fairdropout": "does not hold",
    "scaling": "holds" if (ROOT / "benchmarks" / "results" / "sweeps.json").is_file() else "not tested",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_chapter_as_written_says_what_it_claims_and_warns_of_nothing(name: str) -> None:
    executed = chapters.execute(CHAPTERS[name], {}, root=ROOT)
    recorded = staging.recorded_metrics(executed)
    assert {"claim", "paper"} <= recorded.keys()
    assert recorded["verdict"] == VERDICTS[name]
    assert chapters.stderr_of(executed) == ""


RECORDED = sorted((ROOT / "book" / "results").glob("*/*.json"))
RESULTS = [path for path in RECORDED if path.parent.name in CHAPTERS]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_file_is_small(path: Path) -> None:
    assert path.stat().st_size <= 100_000


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_result_comes_from_its_preset(path: Path) -> None:
    result, chapter = json.loads(path.read_text()), CHAPTERS[path.parent.name]
    preset = chapters.read_preset(ROOT, chapter.name, path.stem)
    assert result["parameters"] == chapters.check(chapter, preset)
    assert result["dataset"] in ("mnist", "cifar10", None)  # None: generated
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), "recorded with changes that were not committed"
    assert len(result["recipes"]) % result["n_seeds"] == 0  # a chapter may have several trainings a seed


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "published").glob("*.json")), ids=lambda path: path.stem)
def test_published_numbers_belong_to_a_chapter_and_say_where_they_come_from(path: Path) -> None:
    assert path.stem in CHAPTERS
    source = json.loads(path.read_text())["source"]
    assert re.search("read off the published figure|the published code of figure \\d, run once", source)
    assert all(len(table) and table.notna().all().all() for table in chapters.published(path.stem, ROOT).values())


@pytest.mark.parametrize(
    "path", [path for path in RESULTS if path.parent.name == "training"], ids=lambda path: path.stem
)
def test_the_recorded_networks_did_memorize(path: Path) -> None:
    curves = next(result for result in chapters.results("training", ROOT) if result.preset == path.stem).tables[
        "curves"
    ]
    final = curves[curves.epoch == curves.epoch.max()]
    assert (final.clean_accuracy >= 0.99).all()
    assert (final.noisy_accuracy >= 0.95).all()


def test_every_preset_fits_its_chapter() -> None:
    presets = [path for path in sorted((ROOT / "book" / "presets").glob("*/*.yaml")) if path.parent.name != "sweeps"]
    assert {path.parent.name for path in presets if path.stem == "smallest"} == set(CHAPTERS)
    for path in presets:
        chapters.check(CHAPTERS[path.parent.name], chapters.read_preset(ROOT, path.parent.name, path.stem))


def nbval(notebook: Path, folder: Path, option: str) -> None:
    """Run nbval on a copy of a notebook, with trainings of its own, so that every number is computed again."""
    folder.mkdir()
    shutil.copy(notebook, folder / "chapter.ipynb")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", option, "--nbval-current-env", "-p", "no:cacheprovider"]
    environment = os.environ | {"MEMLOC_RUNS": str(folder / "runs")}
    done = subprocess.run([*command, "."], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_chapter_on_dropout_runs_where_no_label_is_right() -> None:
    preset = chapters.read_preset(ROOT, "dropout", "smallest") | {"noise_rate": 1.0}
    executed = chapters.execute(CHAPTERS["dropout"], preset, root=ROOT)
    assert staging.recorded_metrics(executed)["verdict"] == "not tested"


@pytest.mark.slow
@pytest.mark.xdist_group("nbval")
@pytest.mark.parametrize("name", CHAPTERS)
def test_executing_a_chapter_again_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    chapter = CHAPTERS[name]
    preset = chapters.read_preset(ROOT, name, "smallest")
    nbval(chapters.execute(chapter, preset, root=ROOT), tmp_path / "again", "--nbval")


@pytest.mark.slow
@pytest.mark.xdist_group("nbval")
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_source_of_a_chapter_runs_cell_by_cell(name: str, tmp_path: Path) -> None:
    notebook = notebooks.write(ROOT, preset="smallest", folder=tmp_path / "sources")[name]
    nbval(notebook, tmp_path / "cells", "--nbval-lax")


def test_the_conda_environment_is_the_same_set() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert packages == ["python=3.11", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[book,test]"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "MEMLOC_TEST_INSTALL" not in os.environ, reason="MEMLOC_TEST_INSTALL is not set: it downloads up to 3 GB"
)
def test_the_pip_section_of_the_conda_environment_installs(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "memloc", tmp_path / "memloc")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    # conda, too, writes the section into a file beside environment.yml
    (tmp_path / "requirements.txt").write_text("\n".join(environment["dependencies"][-1]["pip"]))
    python = tmp_path / ".venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=tmp_path, check=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", "-r", "requirements.txt"], cwd=tmp_path, check=True)
    done = subprocess.run([python.with_name("memloc"), "list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("#!/bin/sh\nexit 1\n", "memloc needs Python 3.11 or newer: name one with make PYTHON=python3.12"),
        ('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n', "cannot make an environment: install its package"),
    ],
    ids=["too old", "without venv"],
)
def test_a_python_that_does_not_serve_is_refused_in_one_line(tmp_path: Path, python: str, message: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python"
    fake.write_text(python)
    fake.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "book", f"PYTHON={fake}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said, make = done.stderr.splitlines()
    assert message in said
    assert re.match(r"make(\[\d+\])?: ", make)
    assert done.returncode != 0
    assert not (tmp_path / ".venv").exists()


def test_tests_of_one_group_run_in_one_process(tmp_path: Path) -> None:
    """With pytest 9.2 and pytest-xdist 3.8 they do not, and two of them start a cluster on the same ports."""
    (tmp_path / "test_group.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        f"def test_it(number): open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len([path for path in tmp_path.iterdir() if path.name.isdecimal()]) == 1
