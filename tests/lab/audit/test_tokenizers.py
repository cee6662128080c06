from lit_opd.lab.audit.tokenizers import segmentation, vocabulary


def test_one_vocabulary_passes(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 17)
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found == "17 ids are the same tokens for both"


def test_padding_of_one_output_layer_is_told_and_passes(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 32)
    assert found.verdict == "pass"
    assert "one output layer has 15 rows of padding more" in found.found
    assert found.numbers == {"shared_ids": 17}


def test_extra_tokens_of_the_teacher_fail_unless_they_are_masked(tiny_tokenizer, make_tiny_tokenizer):
    longer = make_tiny_tokenizer("0123456789+=-!")
    refused = vocabulary(tiny_tokenizer, longer, 24, 24)
    assert refused.verdict == "fail"
    assert "set teacher.extra_tokens=mask" in refused.fix
    masked = vocabulary(tiny_tokenizer, longer, 24, 24, "mask")
    assert (masked.verdict, masked.numbers["shared_ids"]) == ("pass", 17)


def test_a_permutation_of_the_vocabulary_fails_and_is_counted(make_tiny_tokenizer):
    found = vocabulary(make_tiny_tokenizer("0123456789+=-"), make_tiny_tokenizer("1023456789+=-"), 17, 17)
    assert found.verdict == "fail"
    assert found.found == "id 4 is '0' for the student and '1' for the teacher; 2 of 17 ids differ"
    assert found.fix.startswith("Choose a teacher and a student of one tokenizer family. To compare spans of text, ")
    assert found.numbers == {"differing_ids": 2}


def test_an_output_layer_without_rows_for_all_tokens_fails(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 16)
    assert (found.verdict, found.found) == ("fail", "teacher.path has 16, and none for '-' (id 16)")


def test_completions_that_both_tokenizers_spell_alike_pass(make_evidence):
    found = segmentation(make_evidence())
    assert (found.verdict, found.fix, found.numbers) == ("pass", "", {"share": 0.0})


def test_completions_that_the_teachers_tokenizer_spells_otherwise_are_shown(make_evidence, spelling):
    evidence = make_evidence()
    rollout = evidence.rollout
    rollout.ids_BT[:, 0], rollout.ids_BT[:, 1] = 5, 6  # "1", "2"
    rollout.real_BT[:, :2] = True
    evidence.student.tokenizer, evidence.teacher.tokenizer = spelling(False), spelling(True)
    found = segmentation(evidence)
    assert (found.verdict, found.numbers) == ("warn", {"share": 1.0})
    assert "the tokenizers spell 64 of 64 completions differently: '1' '2' by the student's, '12'" in found.found
    assert found.fix.startswith("Look at the ids ranked below, and mend ends that differ first.")
    evidence.teacher.tokenizer = spelling(False)
    assert segmentation(evidence).verdict == "pass"
