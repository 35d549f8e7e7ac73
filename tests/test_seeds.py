"""Ablations tell differences from seed noise."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import seeds


def table(rng, shifts, num_seeds=3):
    "Variants whose KID has seed noise 0.04 and a shift of its own."
    return {
        k: [dict(KID=0.2 + v + 0.04 * rng.normal(), note=1.0) for _ in range(num_seeds)]
        for k, v in shifts.items()
    }


def test_seed_noise_is_the_pooled_standard_deviation():
    rng = np.random.default_rng(0)
    rows = table(rng, {str(i): i for i in range(400)})
    # standard error of a deviation, 800 degrees
    assert abs(seeds.seed_noise(rows)["KID"] / 0.04 - 1) < 4 / (2 * 800) ** 0.5
    assert seeds.seed_noise(rows)["note"] == 0


def test_equal_variants_are_rarely_called_different():
    rng = np.random.default_rng(1)
    shifts = dict(base=0.0, a=0.0, b=0.0, c=0.0, d=0.0)
    wrong = sum(
        any(seeds.findings(table(rng, shifts), "base", ("KID",)).values()) for _ in range(400)
    )
    assert wrong <= 0.05 * 400 + 3 * (400 * 0.05 * 0.95) ** 0.5


def test_a_large_difference_is_found_and_a_small_one_is_not():
    rng = np.random.default_rng(2)
    found = [
        seeds.findings(table(rng, dict(base=0.0, large=0.4, small=0.01)), "base", ("KID",))
        for _ in range(50)
    ]
    assert sum(o["large"] == ["KID"] for o in found) == 50
    assert sum(o["small"] == [] for o in found) >= 45


def test_one_seed_finds_nothing():
    rows = table(np.random.default_rng(3), dict(base=0.0, large=9.0), num_seeds=1)
    assert seeds.findings(rows, "base", ("KID",)) == dict(large=[])
    assert "no difference in this table is told from seed noise" in seeds.describe(
        rows, "base", ("KID",)
    )


@pytest.mark.parametrize(
    "shift, said",
    [(2.0, "differs from base in KID"), (0.0, "no difference from base beyond seed noise")],
)
def test_the_text_says_what_was_found(shift, said):
    assert said in seeds.describe(
        table(np.random.default_rng(4), dict(base=0.0, other=shift)), "base", ("KID",)
    )
