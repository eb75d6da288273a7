"""Time a sweep of 24 cells, two chapters at twelve seeds each, with one worker and with two.

Every sweep has a store and a copy of the book of its own, so that nothing is there already. *Overhead* is what a sweep
with one worker takes beyond the time that the chapters take by themselves (kernel and imports are the chapter's), over
the number of cells; starting Ray is part of it. *Expand* is the time to expand and check a grid of a thousand cells.

Wall-clock time: nothing else should run. Prints a table, then one line of JSON.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from memloc import chapters, grids, sweeps

ROOT = Path(__file__).parents[1]
CHAPTERS = ("spurious", "training")
SEEDS = 12


def copy_book(folder: Path) -> Path:
    """Copy what chapters need, so that no executed notebook is found."""
    shutil.copytree(ROOT / "book", folder / "book")
    shutil.copyfile(ROOT / "_toc.yml", folder / "_toc.yml")
    return folder


def read_grid(root: Path) -> list[grids.Cell]:
    """Expand the grid that is timed."""
    blocks = [
        {"chapter": name, "preset": "smallest", "grid": {"seed": list(range(SEEDS))}, "memory_gb": 2}
        for name in CHAPTERS
    ]
    spec = root / "grid.yaml"
    spec.write_text(json.dumps({"cells": blocks}))  # JSON is YAML
    return grids.read_spec(spec, root)


def time_sweep(workers: int) -> tuple[float, float]:
    """Run the grid from nothing: seconds of the sweep, and of its chapters by themselves."""
    with tempfile.TemporaryDirectory() as scratch:
        root = copy_book(Path(scratch) / "project")
        os.environ["MEMLOC_RUNS"] = str(Path(scratch) / "runs")
        grid = read_grid(root)
        start = time.perf_counter()
        outcome = sweeps.sweep(grid, root=root, workers=workers)
        seconds = time.perf_counter() - start
        if outcome.failures or len(outcome.results) != len(grid):
            raise SystemExit(f"cells failed: {outcome.failures}")
        executed = (root / "_build" / "executed").glob("*.ipynb")
        own = sum(json.loads(path.read_text())["metadata"]["memloc"]["seconds"] for path in executed)
    return seconds, own


def time_expansion() -> float:
    """Expand and check a thousand cells."""
    words = ["seed=" + ",".join(map(str, range(100))), "noise_rate=" + ",".join(f"0.{n}" for n in range(10))]
    start = time.perf_counter()
    if len(grids.from_words("rewinding", words, ROOT)) != 1000:
        raise SystemExit("the grid must have a thousand cells")
    return time.perf_counter() - start


def main() -> None:
    """Time everything and print the comparison."""
    chapters.find(ROOT)
    expand = time_expansion()
    print(f"{'workers':>8}{'seconds':>10}{'chapters alone':>16}")
    found = {}
    for workers in (1, 2):
        found[workers] = time_sweep(workers)
        print(f"{workers:>8}{found[workers][0]:>10.1f}{found[workers][1]:>16.1f}", flush=True)
    count = len(CHAPTERS) * SEEDS
    ratios = {
        "scaling_2_workers": round(found[1][0] / found[2][0], 2),
        "overhead_per_cell_s": round((found[1][0] - found[1][1]) / count, 2),
        "expand_1000_s": round(expand, 2),
        "cells": count,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(f"overhead of a cell: {ratios['overhead_per_cell_s']} s; a thousand cells expand in {expand:.2f} s")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
