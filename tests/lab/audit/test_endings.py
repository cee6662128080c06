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


def test_an_end_that_the_teacher_does_not_declare_is_no_failure(by_hand):
    found = ends(by_hand, 1e-4, 3, teacher_stops=(2,))
    assert found.verdict == "warn"
    assert found.fix.startswith("If that token ends the teacher's completions, let either ending stop the student")


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
