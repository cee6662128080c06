import copy
from dataclasses import replace

import torch

from lit_opd.lab.audit.endings import stop_tokens, teacher_at_ends

FIX = "add 3 ('<unk>') to eos_token_id in its generation_config.json, as [2, 3]"


def test_the_same_stop_tokens_pass(make_evidence):
    found = stop_tokens(make_evidence())
    assert (found.verdict, found.found) == ("pass", "'<eos>' for both")


def test_a_stop_token_that_only_the_teacher_has_is_told_with_the_fix(by_hand):
    found = stop_tokens(by_hand([(5, 0.0, 5, True)], stops=[2], teacher_stops=[3]))
    assert (found.verdict, found.found) == ("warn", "'<eos>' for the student, '<unk>' for the teacher")
    assert FIX in found.fix
    assert "Do not mask a stop token" in found.fix


def test_a_student_that_stops_at_either_end_passes(by_hand):
    found = stop_tokens(by_hand([(5, 0.0, 5, True)], stops=[2, 3], teacher_stops=[3]))
    assert (found.verdict, found.fix) == ("pass", "")


def test_a_student_without_stop_tokens_fails(by_hand):
    found = stop_tokens(by_hand([(5, 0.0, 5, True)], stops=[], teacher_stops=[3]))
    assert (found.verdict, found.found) == ("fail", "the student has none, and never ends")


def ends(by_hand, mass, expected, teacher_stops=(3,)):
    rows = [(2, 0.0, expected, True), (5, 0.0, 5, True), (2, 0.0, expected, True), (2, 0.0, expected, True)]
    logps = torch.tensor([mass, 1e-9, mass, 1e-9]).log()
    return teacher_at_ends(by_hand(rows, teacher_stops=teacher_stops, stop_logps_N=logps))


def test_the_median_mass_at_ends_decides(by_hand):
    found = ends(by_hand, 0.5, 2)
    assert (found.verdict, found.numbers["ends"]) == ("pass", 3)
    assert found.numbers["median_stop_mass"] == torch.tensor(0.5).log().exp().item()
    assert ends(by_hand, 0.05, 3).verdict == "warn"
    found = ends(by_hand, 1e-4, 3)
    assert found.verdict == "fail"
    assert found.found.endswith("a median mass of 0.0001, and at 100% of them expects '<unk>'")
    assert FIX in found.fix


def test_where_the_teacher_goes_on_the_student_stops_too_early_and_nothing_is_to_be_added(by_hand):
    found = ends(by_hand, 1e-4, 5, teacher_stops=(2,))
    assert found.verdict == "warn"
    assert found.found.endswith("at 100% of them expects '1'")
    assert found.fix == (
        "The student stops where the teacher goes on, which training unlearns. Should '1' end the teacher's "
        "completions, name it as eos_token_id in the teacher's generation_config.json."
    )


def at_mixed_ends(by_hand, expected, teacher_stops=(2,)):
    logps = torch.tensor([1e-4 if i != 2 else 0.9 for i in expected]).log()
    rows = [(2, 0.0, i, True) for i in expected]
    return teacher_at_ends(by_hand(rows, teacher_stops=teacher_stops, stop_logps_N=logps))


def test_an_end_that_the_models_share_is_never_what_is_missing(by_hand):
    early = at_mixed_ends(by_hand, [2, 2, 2, 5, 5, 6, 7])
    assert early.verdict == "warn"
    assert early.found.endswith("at 29% of them expects '1'")
    assert "eos_token_id in its" not in early.fix
    foreign = at_mixed_ends(by_hand, [2, 2, 2, 3, 3, 6, 7], teacher_stops=(2, 3))
    assert foreign.verdict == "fail"
    assert FIX in foreign.fix


def test_a_flat_teacher_whose_first_choice_is_the_students_end_is_told_without_a_token(by_hand):
    found = ends(by_hand, 0.05, 2, teacher_stops=(2,))
    assert (found.verdict, found.fix) == (
        "warn", "The student stops where the teacher goes on, which training unlearns."
    )  # fmt: skip
    assert "expects" not in found.found


def test_completions_that_never_end_are_told(by_hand):
    found = teacher_at_ends(by_hand([(5, 0.0, 5, True), (6, 0.0, 5, True)]))
    assert (found.verdict, found.found) == ("warn", "none of 2 completions ended")


def test_a_teacher_with_another_end_loses_the_mass_and_its_equivalent_brings_it_back(make_evidence, models, swap):
    student = copy.deepcopy(models[0])
    teacher = swap(student, 2, 3)
    teacher.generation_config.eos_token_id = 3
    same = teacher_at_ends(make_evidence(student, student)).numbers["median_stop_mass"]
    evidence = make_evidence(student, teacher)
    lost = teacher_at_ends(evidence).numbers["median_stop_mass"]
    student.generation_config.eos_token_id = [2, 3]
    mended = teacher_at_ends(replace(evidence)).numbers["median_stop_mass"]
    assert lost < 0.5 * same
    assert mended >= same
