"""Draw the README's figure from recorded results: `make figure`."""

from pathlib import Path

import matplotlib.pyplot as plt

from memloc import chapters, plots

PRESET = "cifar10-10k"
FILE = Path(__file__).parent / "_static" / "figure.png"


def main() -> None:
    """Draw training left and rewinding right, on white, because a README has no dark mode of its own."""
    curves, lost = (
        next(result for result in chapters.results(chapter) if result.preset == PRESET).tables[table]
        for chapter, table in (("training", "curves"), ("rewinding", "at-onset"))
    )
    plots.set_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), facecolor="white")
    plots.accuracy_curves(curves, left).legend(fontsize=9)
    left.set_title("what is memorized, and when")
    plots.treatment_bars(lost, "noisy_lost", right).legend(title="batch-norm statistics", fontsize=9)
    right.set_title("wrong labels lost when one layer is put back")
    figure.savefig(FILE, dpi=130, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
