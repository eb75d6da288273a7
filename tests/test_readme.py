import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memloc import chapters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_in_the_readme_runs_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"^0 +0 +0\.\d+ +0\.\d+\n", done.stdout, re.MULTILINE), "the history begins with epoch 0"
    assert re.search(r"^0 +0 +-?\d", done.stdout, re.MULTILINE), "layer group 0 is the first row"


def test_every_command_in_the_readme_names_a_chapter_a_preset_and_parameters_that_exist():
    known = chapters.find(ROOT)
    runs = re.findall(r"memloc run (\S+)(.*?)(?:#|\n|`)", README)
    assert len(runs) >= 2
    for name, rest in runs:
        values = dict(word.split("=") for word in re.findall(r"-p (\S+)", rest))
        for preset in re.findall(r"-f (\S+)", rest):
            values |= chapters.read_preset(ROOT, name, preset)
        chapters.check(known[name], values)


def test_every_file_and_make_target_that_the_readme_names_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / link).exists(), link
        assert set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE)) <= targets


def test_the_ratios_in_the_readme_are_those_that_were_kept():
    kept = {}
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        kept |= {f"{path.stem}.{name}": value for name, value in json.loads(path.read_text())["ratios"].items()}
    table = README.partition("## How fast")[2].partition("## Installing")[0]
    quoted = [float(number) for number in re.findall(r"(?<!-)\b\d+(?:\.\d+)?", table.partition("| --- | --- |")[2])]
    measured = [
        kept[name]
        for name in (
            "gradients.reference_over_plain", "gradients.step_over_plain", "dropout.reference_over_floor_sum",
            "dropout.mask_over_floor_sum", "dropout.step_over_plain", "flipping.parity_speedup",
            "flipping.default_speedup",
            "manifolds.solve_speedup_m200", "manifolds.solve_speedup_m50", "manifolds.call_speedup",
            "mat.speedup_mat_20_seeds", "mat.speedup_20_seeds",
        )
    ]  # fmt: skip
    assert quoted == pytest.approx(measured, rel=0.04)
