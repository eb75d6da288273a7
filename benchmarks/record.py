"""Run benchmarks and keep the ratios that they print, for the status page and the README.

``python benchmarks/record.py NAME …`` runs ``benchmarks/NAME.py`` (all of them without a name) and writes the JSON of
its last line to ``benchmarks/results/NAME.json``, with the machine, the versions, the commit and the day.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from memloc import records

HERE = Path(__file__).parent
ROOT = HERE.parent


def run(name: str) -> dict[str, float]:
    """Run one benchmark, show what it prints, and return the ratios of its last line."""
    with subprocess.Popen([sys.executable, HERE / f"{name}.py"], stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for last in process.stdout or ():
            print(last, end="", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {name: value for name, value in json.loads(last).items() if isinstance(value, int | float)}


def main() -> None:
    """Run the benchmarks that are named."""
    known = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))
    names = sys.argv[1:] or known
    for name in names:
        if name not in known:
            raise SystemExit(f"NAME must be one of {', '.join(known)}, got {name!r}")
    folder = HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    commit = records.commit(ROOT)  # of the code that is timed: a benchmark takes minutes
    for name in names:
        found = {
            "ratios": run(name),
            "machine": f"{records.cpu()}, one thread",
            "versions": records.versions(),
            "commit": commit,
            "date": date.today().isoformat(),
            "command": f"python benchmarks/record.py {name}",
        }
        temporary = folder / f".{name}.json"
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(folder / f"{name}.json")


if __name__ == "__main__":
    main()
