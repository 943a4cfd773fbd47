"""docs/cost.md says what the count of FLOPs says; tests/real/cost_page.py writes it."""

import subprocess
import sys

import pytest

from speechjax.ahead.hardware import CHIPS
from tests.conftest import REPO
from tests.real import cost_page
from tests.real.cost_page import Assumed, compact, cost_row, recipe_row, size_of, size_row

LINES = cost_page.PAGE.read_text().splitlines()
CHEAP = ("wav2vec2 base", "hubert large")  # a second each
SPECS = {published.name: published for published in cost_page.PUBLISHED}


@pytest.mark.parametrize("name", CHEAP)
def test_the_page_says_what_is_counted(name):
    published, assumed = SPECS[name], Assumed()
    first, second = cost_page.HOURS
    rows = [size_row(published, first, assumed), cost_row(published, second, assumed), recipe_row(published, assumed)]
    assert [row for row in rows if row not in LINES] == [], "give the command in tests/real/cost_page.py again"


def test_other_assumptions_are_not_on_the_page():
    """Negative control."""
    published, hours = SPECS[CHEAP[0]], cost_page.HOURS[0]
    assert size_row(published, hours, Assumed(mfu=0.41)) not in LINES
    assert size_row(published, hours, Assumed(useful=0.9)) not in LINES
    assert recipe_row(published, Assumed(mfu=0.41)) not in LINES


def test_every_size_is_in_every_table():
    for name in SPECS:
        assert sum(line.startswith(f"| {name} |") for line in LINES) == 3


def test_a_cell_by_hand():
    """wav2vec 2.0 Base, 46.2 GFLOP a second (tests/test_flops.py has 46.0 in crops of 15 s), 459 TFLOP/s at 40 %."""
    size = size_of(SPECS["wav2vec2 base"].spec)
    assert size.flops == pytest.approx(46.2e9, rel=2e-3)
    assert size.parameters == pytest.approx(95.0e6, rel=1e-3)
    assert size.heard == pytest.approx(400_000 * 1.5556, rel=1e-4)
    by_hand = 100_000 * 46.2e9 / 0.93 / (459e12 * 0.4)
    found = cost_page.accelerator_hours(size.flops, 100_000, "v5p", mfu=0.4, useful=0.93)
    assert found == pytest.approx(by_hand, rel=2e-3)
    assert {chip: CHIPS[chip].flops / 1e12 for chip in cost_page.HARDWARE} == {"v5p": 459, "v6e": 918, "h100": 989}


def test_numbers_have_three_digits():
    assert [compact(x) for x in (3.081, 27.04, 357.8, 99.96, 1234.4)] == ["3.08", "27.0", "358", "100", "1,234"]


def test_shares_are_shares():
    script = REPO / "tests/real/cost_page.py"
    done = subprocess.run([sys.executable, script, "--mfu=40"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--mfu=40.0: above 0, at most 1" in done.stderr
