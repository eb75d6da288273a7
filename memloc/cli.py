"""The ``memloc`` command, which alone speaks to a person.

Whatever a person gets wrong is answered in one line on stderr, with exit status 2. Nothing heavy is imported before
it is needed, so that ``--help``, ``list`` and every refusal come at once.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from memloc import chapters, records, screen
from memloc.parameters import as_word, did_you_mean

if TYPE_CHECKING:
    from memloc.grids import Cell
    from memloc.sweeps import Estimate, Outcome


class UsageError(ValueError):
    """A command that cannot be carried out; the message is one line."""


def main(words: Sequence[str] | None = None) -> int:
    """Carry out one command.

    Args:
        words: The words after ``memloc``; by default those of the command line.

    Returns:
        The exit status: 0, 1 when a chapter failed, 2 when what was asked for is not possible, 130 after Ctrl-C, 141
        where nobody reads on.
    """
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, _stop)
    try:
        status: int = options.command(options)
        print(end="", flush=True)  # nothing where stdout is closed
    except BrokenPipeError:  # the reader has seen enough, as in `memloc list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("memloc: interrupted", file=sys.stderr)
        return 130
    except chapters.ChapterError as error:
        print(f"{error.traceback}\nmemloc: {error}; as far as it came: {error.notebook}", file=sys.stderr)
        return 1
    except (chapters.ParameterError, chapters.ProjectError, UsageError, OSError) as error:
        print(f"memloc: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


def _stop(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C, which ends the kernels; other processes of ours get the signal passed on."""
    for child in multiprocessing.active_children():
        child.terminate()
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memloc: {message} ({self.prog} --help shows how)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("memloc", description="Where do neural networks keep what they memorize? Run the book's chapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    one = commands.add_parser("list", help="show the chapters and their parameters")
    one.set_defaults(command=_list)

    one = commands.add_parser("run", help="execute a chapter with parameters of your own")
    one.add_argument("chapter", metavar="CHAPTER")
    one.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="set a parameter (repeatable)")
    one.add_argument("-f", metavar="PRESET", help="a preset in book/presets/CHAPTER, or a YAML file; -p overrides it")
    one.add_argument("-o", type=Path, metavar="OUT.ipynb", help="copy the executed notebook here")
    one.add_argument("--record", action="store_true", help="keep the numbers in book/results/CHAPTER/PRESET.json")
    one.add_argument("--threads", type=_threads, default=1, metavar="N", help="threads of the kernel (1)")
    one.set_defaults(command=_run)

    one = commands.add_parser("sweep", help="run a grid of chapters and trainings, on this machine or a Ray cluster")
    one.add_argument("grid", metavar="SPEC.yaml|CHAPTER", help="a file of grids, or a chapter with -p")
    one.add_argument(
        "-p", action="append", default=[], metavar="NAME=VALUE,…", help="values of a parameter (repeatable)"
    )
    one.add_argument("-o", type=Path, metavar="OUT.csv", help="the table of results (in the store of the trainings)")
    one.add_argument("--dry-run", action="store_true", help="show what would run, and how long it may take")
    one.add_argument(
        "--record",
        action="store_true",
        help="keep the numbers in book/results/sweeps/SPEC.json; with --dry-run, those that are there",
    )
    one.add_argument("--workers", type=_threads, metavar="N", help="CPUs of this machine to use (all)")
    one.add_argument("--address", metavar="HOST:PORT", help="join a Ray cluster instead of starting Ray here")
    one.add_argument("--cpus", type=_threads, metavar="N", help="threads of each cell (1)")
    one.add_argument("--gpus", type=float, metavar="X", help="GPUs of each cell, such as 0.25")
    one.add_argument("--memory-gb", type=float, metavar="X", help="memory of each cell (4)")
    one.add_argument("--cell", metavar="ADDRESS", help="run one cell of the sweep alone, without Ray")
    one.set_defaults(command=_sweep)

    one = commands.add_parser("build", help="execute what has changed and build the book")
    one.set_defaults(command=_build)

    one = commands.add_parser("data", help="show, download or locate the data sets")
    actions = one.add_subparsers(required=True, metavar="ACTION", title="actions")
    actions.add_parser("list", help="show name, size, source and licence").set_defaults(command=_data_list)
    get = actions.add_parser("get", help="download a data set")
    get.add_argument("name", metavar="NAME")
    get.set_defaults(command=_data_get)
    actions.add_parser("path", help="print the folder they are in").set_defaults(command=_data_path)

    one = commands.add_parser("runs", help="show or delete the trainings on disk")
    one.set_defaults(command=_runs_list)
    actions = one.add_subparsers(metavar="ACTION", title="actions")
    actions.add_parser("list", help="show address, epochs, size and age").set_defaults(command=_runs_list)
    show = actions.add_parser("show", help="print one training's recipe")
    show.add_argument("address", metavar="ADDRESS", help="its beginning is enough")
    show.set_defaults(command=_runs_show)
    delete = actions.add_parser("delete", help="delete trainings")
    delete.add_argument("addresses", nargs="*", metavar="ADDRESS")
    delete.add_argument("--all", action="store_true", help="delete every training")
    delete.set_defaults(command=_runs_delete)
    return parser


def _threads(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {word!r}")
    return int(word)


def _list(options: argparse.Namespace) -> int:
    root = chapters.project_root()
    for chapter in chapters.find(root).values():
        measured = chapters.last_executed(root, chapter)
        seconds = f"{measured['seconds']:.0f} s" if measured else "not executed here yet"
        print(f"{chapter.name} – {chapter.title} ({seconds})")
        rows = []
        for name, default in chapter.parameters.items():
            about = chapters.PARAMETERS[name]
            meaning = f"{about.meaning} ({', '.join(about.choices)})" if about.choices else about.meaning
            rows.append((f"  {name}", about.type.__name__, as_word(default), meaning))
        screen.print_table(rows)
        presets = sorted(path.stem for path in (root / "book" / "presets" / chapter.name).glob("*.yaml"))
        print(f"  presets for -f: {', '.join(presets) or 'none'}\n")
    return 0


def _run(options: argparse.Namespace) -> int:
    root = chapters.project_root()
    chapter = chapters.get(root, options.chapter)
    values: dict[str, object] = chapters.read_preset(root, chapter.name, options.f) if options.f else {}
    for word in options.p:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"-p takes NAME=VALUE, got {word!r}")
        values[name] = value
    chapters.check(chapter, values)
    if options.record:
        _check_recordable(options, root)
    if options.o and (options.o.suffix != ".ipynb" or options.o.is_dir() or not options.o.absolute().parent.is_dir()):
        raise UsageError(f"-o takes the path of an .ipynb file in a folder that is there, got {str(options.o)!r}")

    line = screen.Line()
    try:
        executed = chapters.execute(chapter, values, root=root, threads=options.threads, progress=line.show)
    finally:
        line.end()
    _print_metrics(executed)
    if options.record:
        command = shlex.join(["memloc", "run", chapter.name, "-f", options.f, "--record"])
        try:
            print(records.keep(root, executed, options.f, command))
        except ValueError as error:
            raise UsageError(str(error)) from error
    if options.o:
        shutil.copyfile(executed, options.o)
    print(options.o or executed)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from memloc import cells as cells_
    from memloc import sweeps

    root = chapters.project_root()
    spec = options.grid if options.grid.endswith((".yaml", ".yml")) else None
    cells = _read_cells(options, spec, root)
    if options.address and options.workers:
        raise UsageError("--workers is for this machine: leave it out with --address")
    table = options.o or cells_.folder() / f"{Path(options.grid).stem}.csv"
    if options.o and (options.o.suffix != ".csv" or options.o.is_dir() or not options.o.absolute().parent.is_dir()):
        raise UsageError(f"-o takes the path of a .csv file in a folder that is there, got {str(options.o)!r}")
    if options.record:
        _check_grid_recordable(options, root)
    _print_plan(cells, sweeps.estimate(cells))
    if options.dry_run:
        if options.record:
            _keep_sweep(options, root, cells, sweeps.done(cells))
        return 0
    outcome, progress = sweeps.Outcome(), screen.Progress()
    try:
        if options.cell is not None:
            outcome = _run_cell(cells[0], root)
        else:
            outcome = sweeps.sweep(
                cells, root=root, address=options.address, workers=options.workers, show=progress.show
            )
    except sweeps.SweepError as error:
        raise UsageError(str(error)) from error
    finally:
        progress.end()
    for cell in cells:
        if cell.address in outcome.failures:
            failed = outcome.failures[cell.address]
            print(f"{failed['details'].rstrip()}\n{cell.name}: {failed['error']}\n  alone: {cell.command(spec)}")
    if options.cell is not None and not options.o:
        table = cells_.folder()  # one cell alone leaves the table of the whole sweep as it is
    else:
        sweeps.write_table(table, cells, outcome)  # after the failures, of which a full disk may be one
    print(f"{len(outcome.results)} done, {len(outcome.failures)} failed: {table}")
    if options.record:
        _keep_sweep(options, root, cells, outcome)
    return 1 if outcome.failures else 0


def _read_cells(options: argparse.Namespace, spec: str | None, root: Path) -> "list[Cell]":
    """Expand the file or the words, and take the one cell that is asked for, if one is."""
    from memloc import grids

    given = {name: value for name in ("cpus", "gpus", "memory_gb") if (value := getattr(options, name)) is not None}
    if spec is None:
        cells = grids.from_words(options.grid, options.p, root, grids.Resources(**given))
    elif options.p:
        raise UsageError("-p belongs to a chapter: write the values into the file")
    elif given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise UsageError(f"{option} belongs to a chapter: write it into the blocks of the file")
    else:
        cells = grids.read_spec(Path(spec), root)
    if options.cell is None:
        return cells
    chosen = [cell for cell in cells if cell.address.startswith(options.cell)]
    if len(chosen) != 1:
        raise UsageError(f"{len(chosen)} cells begin with {options.cell!r}: expected one (--dry-run lists them)")
    return chosen


def _run_cell(cell: "Cell", root: Path) -> "Outcome":
    """Run one cell in this process."""
    from memloc import cells, sweeps

    outcome = sweeps.Outcome()
    outcome.take(cell, cells.attempt(cell, root))
    return outcome


def _print_plan(cells: Sequence["Cell"], estimate: "Estimate") -> None:
    """Show what will run: all parameters that differ, up to twenty cells."""
    rows = [(cell.address, cell.name, _given(cell)) for cell in cells]
    screen.print_table(rows[:20])
    if len(rows) > 20:
        print(f"… and {len(rows) - 20} more")
    seconds = (
        "time unknown" if estimate.seconds is None else f"about {screen.duration(estimate.seconds)} one after the other"
    )
    unknown = f", {estimate.unknown} of unknown length" if estimate.seconds is not None and estimate.unknown else ""
    left = f" ({seconds}{unknown})" if estimate.todo else ""
    print(f"{len(cells)} cells: {estimate.done} done already, {estimate.todo} to do{left}", flush=True)


def _given(cell: "Cell") -> str:
    return " ".join(f"{name}={as_word(value)}" for name, value in cell.values.items())


def _check_recordable(options: argparse.Namespace, root: Path) -> None:
    if not options.f or not (root / "book" / "presets" / options.chapter / f"{options.f}.yaml").is_file():
        raise UsageError(f"--record needs the name of a preset in book/presets/{options.chapter}: add -f NAME")
    if options.p:
        raise UsageError("--record keeps what a preset gives: leave out -p, or change the preset")
    try:
        records.commit(root)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_grid_recordable(options: argparse.Namespace, root: Path) -> None:
    if Path(options.grid).resolve().parent != (root / "book" / "presets" / "sweeps").resolve():
        raise UsageError("--record needs a file in book/presets/sweeps")
    if options.cell is not None:
        raise UsageError("--record keeps the whole sweep: leave out --cell")
    try:
        records.commit(root)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _keep_sweep(options: argparse.Namespace, root: Path, cells: Sequence["Cell"], outcome: "Outcome") -> None:
    from memloc import sweeps

    grid = Path(options.grid)
    words = ["memloc", "sweep", f"book/presets/sweeps/{grid.name}", "--record"] + ["--dry-run"] * options.dry_run
    print(sweeps.keep(root, grid.stem, cells, outcome, shlex.join(words)))


def _print_metrics(executed: Path) -> None:
    content = records.recorded(json.loads(executed.read_text()))
    if content and content["metrics"]:
        screen.print_table([(key, records.text(value)) for key, value in content["metrics"].items()])


def _build(options: argparse.Namespace) -> int:
    from memloc import book

    try:
        page = book.build(chapters.project_root(), progress=lambda line: print(line, flush=True))
    except book.BookError as error:
        print("\n".join([*error.details, f"memloc: {error}"]), file=sys.stderr)
        return 1
    print(page)
    return 0


def _data_list(options: argparse.Namespace) -> int:
    from memloc import datasets

    rows = [
        (name, screen.size(source.size_bytes), source.name, source.licence, source.url)
        for name, source in datasets.SOURCES.items()
    ]
    screen.print_table([("name", "download", "what it is", "licence", "source"), *rows])
    return 0


def _data_get(options: argparse.Namespace) -> int:
    from memloc import datasets

    same = {name.replace("-", ""): name for name in datasets.SOURCES}  # cifar10n is cifar-10n
    name = same.get(options.name.replace("-", ""), options.name)
    if name not in datasets.SOURCES:
        raise UsageError(
            f"unknown data set {name!r}{did_you_mean(name, datasets.SOURCES)} (memloc data list shows all)"
        )
    source = datasets.SOURCES[name]
    print(f"{source.name}: {screen.size(source.size_bytes)} from {source.url}, licence: {source.licence}", flush=True)
    try:
        print(datasets.get(name))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _data_path(options: argparse.Namespace) -> int:
    from memloc import datasets

    print(datasets.root())
    return 0


def _runs_list(options: argparse.Namespace) -> int:
    from memloc import runs

    infos = runs.listing()
    for info in infos:
        age_h = (time.time() - info.modified) / 3600
        epochs = f"{info.epochs_done}/{info.epochs} epochs" + ("" if info.is_whole else ", unfinished")
        about = " ".join(as_word(info.recipe.get(key)) for key in ("dataset", "model", "seed"))
        print(f"{info.address}  {epochs}  {screen.size(info.size_bytes)}  {age_h:.1f} h ago  {about}")
    print(f"{len(infos)} runs, {screen.size(sum(info.size_bytes for info in infos))} in {runs.root()}")
    return 0


def _runs_show(options: argparse.Namespace) -> int:
    from memloc import runs

    address = _find_run(options.address)
    recipe = next(info.recipe for info in runs.listing() if info.address == address)
    screen.print_table([(name, as_word(value)) for name, value in recipe.items()])
    return 0


def _runs_delete(options: argparse.Namespace) -> int:
    from memloc import runs

    if options.all == bool(options.addresses):
        raise UsageError("runs delete takes addresses, or --all (memloc runs list shows them)")
    doomed = runs.addresses() if options.all else [_find_run(beginning) for beginning in options.addresses]
    freed_bytes = [runs.delete(address) for address in doomed]
    print(f"deleted {len(doomed)} runs, {screen.size(sum(freed_bytes))}")
    return 0


def _find_run(beginning: str) -> str:
    """Find the one address that begins like this; the run may be damaged."""
    from memloc import runs

    found = [address for address in runs.addresses() if address.startswith(beginning)]
    if len(found) != 1:
        raise UsageError(f"{len(found)} runs begin with {beginning!r}: expected one (memloc runs list shows all)")
    return found[0]
