"""The promises of docs/statistics.md, simulated again: false findings, coverage, power."""

import pytest

from tools.simulate_comparisons import PAGE, World, ahead, share, simulate, simulate_before

SHOWN = 2000  # repetitions of a row of the page


@pytest.fixture(scope="module")
def page():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(row[0], len(row)): row for row in rows}


def test_equal_variants_are_told_apart_in_one_of_twenty_comparisons(page):
    found = simulate(World(ahead(0.0), 3), SHOWN)
    assert found.false <= 0.06
    assert 0.93 <= found.means <= 0.97
    assert found.contrasts >= 0.95
    shown = page["3", 11]
    assert [shown[1], shown[3], shown[4]] == [share(found.false), share(found.means), share(found.contrasts)]


@pytest.mark.parametrize(("seeds", "by", "promised", "column"), [(3, 4.0, 0.90, 9), (5, 3.0, 0.95, 7)])
def test_a_difference_of_few_standard_deviations_is_found(seeds, by, promised, column, page):
    """Each of the four differences, and all four in one comparison, which is harder."""
    few = simulate(World(ahead(by), seeds), 500)
    assert few.true >= promised
    assert few.all_true >= promised
    assert page[str(seeds), 11][column] == share(simulate(World(ahead(by), seeds), SHOWN).true)
    assert simulate_before(World(ahead(by), seeds), 200).true < 0.6


def test_a_baseline_and_all_pairs_keep_the_level_too():
    for contrasts in ("0", "all"):
        assert simulate(World(ahead(0.0), 3), 600, contrasts=contrasts).false <= 0.065


def test_prompts_and_seeds_that_move_all_variants_change_no_level():
    world = World(ahead(0.0), 4, seed_effect=2.0, prompts=20, prompt_effect=3.0, interaction=2.0, rest=2.0)
    found = simulate(world, 600)
    assert found.false <= 0.07
    assert 0.93 <= found.means <= 0.97
