import statistics
from pathlib import Path

import pytest

from lit_opd.lab.audit.ranking import log_ratios, rank_tokens

MINUS, END = 16, 2
TAG = [(MINUS, ratio, 14, True) for ratio in (15.0, 16.0, 17.0, 16.0)]
PLAIN = [(5, ratio, 5, True) for ratio in (0.5, -0.25, 1.0)] + [(6, 0.25, 7, True)]
STOP = [(END, ratio, 3, True) for ratio in (9.0, 9.5, 8.5)]


def test_ids_are_ranked_by_their_mean_with_its_standard_error(by_hand):
    rows = rank_tokens(by_hand(TAG + PLAIN))
    assert [row.id for row in rows] == [MINUS, 5, 6]
    tag, plain, once = rows
    assert (tag.token, tag.count, tag.expected, tag.stops, tag.huge) == ("'-'", 4, "'+'", False, True)
    assert tag.mean == pytest.approx(16.0)
    assert tag.error == pytest.approx(statistics.stdev([15.0, 16.0, 17.0, 16.0]) / 2)
    assert plain.mean == pytest.approx(1.25 / 3)
    assert once.error != once.error
    assert [row.share for row in rows] == pytest.approx([64 / 65.5, 1.25 / 65.5, 0.25 / 65.5])
    assert not plain.huge
    assert not once.huge


def test_the_mean_probability_of_the_teachers_choice_is_told(by_hand):
    import torch

    rows = [(5, 0.0, 6, True), (5, 0.0, 6, True), (5, 0.0, 7, True)]
    (row,) = rank_tokens(by_hand(rows, top_logps_N=torch.tensor([0.5, 0.25, 1.0]).log()))
    assert (row.expected_id, row.expected_mass) == (6, pytest.approx(0.375))


def test_small_log_ratios_pass(by_hand):
    found = log_ratios(by_hand(PLAIN))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found.startswith("largest mean log-ratio 0.42 ± 0.36 nats, at '1'")


def test_an_id_that_carries_the_sum_is_named_with_its_mask(by_hand):
    found = log_ratios(by_hand(TAG + PLAIN, masked=["7"]))
    assert found.verdict == "warn"
    assert found.found == "1 of 3 ids carry 98% of the sum: '-' 16.0 ± 0.4 nats, where the teacher expects '+'"
    assert "set estimator.masked_tokens=[7,16] so that '-' do not count" in found.fix
    assert found.fix.startswith("As a stop-gap")
    assert found.numbers["share"] == pytest.approx(64 / 65.5)


NO_HABITS = {
    "rare": TAG[:2],
    "below five nats": [(MINUS, 4.9, 14, True)] * 9,
    "too uncertain": [(MINUS, ratio, 14, True) for ratio in (0.0, 0.0, 40.0)],
    "a small share": [(MINUS, 6.0, 14, True)] * 3 + [(5, 100.0, 5, True), (6, -400.0, 5, True)],
}


@pytest.mark.parametrize("rows", NO_HABITS.values(), ids=NO_HABITS)
def test_what_is_no_habit_is_not_flagged(by_hand, rows):
    assert log_ratios(by_hand(rows + PLAIN)).verdict == "pass"


def test_a_stop_token_is_never_to_be_masked_but_made_equivalent(by_hand):
    found = log_ratios(by_hand(STOP + PLAIN, teacher_stops=[3]))
    assert found.verdict == "warn"
    assert "estimator.masked_tokens" not in found.fix
    assert "add 3 ('<unk>') to eos_token_id in its generation_config.json, as [2, 3]" in found.fix


def test_ends_that_are_equivalent_already_pass(by_hand):
    assert log_ratios(by_hand(STOP + PLAIN, stops=[2, 3])).verdict == "pass"


def test_both_remedies_are_proposed_where_both_are_needed(by_hand):
    found = log_ratios(by_hand(STOP + TAG + PLAIN, teacher_stops=[3]))
    assert found.found.startswith("2 of 4 ids carry 98% of the sum")
    assert found.fix.index("as [2, 3]") < found.fix.index("As a stop-gap") < found.fix.index("masked_tokens=[16]")


def test_what_a_mask_was_worth_is_told_as_it_was_measured(by_hand):
    """The numbers are those of the table: `both` is mask and ends, `either end stops` the ends alone."""
    measured = (Path(__file__).parents[3] / "docs" / "mismatched_pair.md").read_text()
    after = {}
    for steps, section in zip((60, 150), measured.split(" steps:\n")[1:], strict=True):
        part = section.partition("\n## ")[0]
        rows = [line.split("|") for line in part.splitlines() if line.startswith("| full_vocab")]
        after[steps] = {arm.strip(): float(value) for _, _, arm, _, value, *_ in rows}
    told = [
        f"{after[steps]['both']:.3f} against {after[steps]['either end stops']:.3f} after {steps}"
        for steps in (60, 150)
    ]
    fix = log_ratios(by_hand(TAG + PLAIN)).fix
    assert all(sentence in fix for sentence in told), told


@pytest.mark.parametrize("expected", [END, 14], ids=["its own end", "an ordinary token"])
def test_a_stop_token_where_the_teacher_goes_on_is_neither_made_equivalent_nor_masked(by_hand, expected):
    found = log_ratios(by_hand([(END, 9.0, expected, True)] * 3 + PLAIN))
    assert (found.verdict, found.fix) == (
        "warn", "The student stops where the teacher goes on, which training unlearns."
    )  # fmt: skip


def test_what_does_not_count_is_left_out_and_told(by_hand):
    masked = [(i, ratio, expected, False) for i, ratio, expected, _ in TAG]
    found = log_ratios(by_hand(masked + PLAIN))
    assert found.verdict == "pass"
    assert found.found.endswith("; left out already: '-'")


def test_an_id_that_counts_at_some_places_is_judged_by_these(by_hand):
    (row,) = rank_tokens(by_hand([(5, 1.0, 5, True), (5, 3.0, 5, True), (5, 80.0, 6, False)]))
    assert (row.count, row.mean, row.share, row.expected_id) == (2, 2.0, 1.0, 5)


def test_a_swapped_teacher_is_found_in_real_rollouts(make_evidence, models, swap):
    common = [row.id for row in sorted(rank_tokens(make_evidence()), key=lambda row: -row.count) if not row.stops][:2]
    swapped = swap(models[0], *common)
    rows = rank_tokens(make_evidence(teacher=swapped))
    assert {row.id for row in rows[:2]} == set(common)
    assert rows[1].mean > 1
    assert max(abs(row.mean) for row in rows[2:]) < 1e-4, "a swap moves no other token's logit, nor the sum over all"
    masked = rank_tokens(make_evidence(teacher=swapped, masked=tuple(common)))
    assert not set(common) & {row.id for row in masked}
    assert max(abs(row.mean) for row in masked) < 1e-4
