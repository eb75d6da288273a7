import math

import numpy as np
import pytest

from memloc.intervals import interval


def test_the_interval_covers_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(2, 3, size=3)) for _ in range(4000)]
    covered = np.mean([abs(each.mean - 2) <= each.half_width for each in found])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval_and_says_so():
    found = interval([0.5])
    assert math.isnan(found.half_width)
    assert str(found) == "0.500"


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match="values must hold at least one number"):
        interval([])
