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
