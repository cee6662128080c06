import torch


def test_what_is_read_is_what_plain_forward_passes_say(make_evidence, full_logits):
    evidence = make_evidence(masked=(5,))
    found, rollout, mask = evidence.readings, evidence.rollout, evidence.rollout.real_BT
    student, teacher = (
        full_logits(m.model, rollout).log_softmax(-1)[mask] for m in (evidence.student, evidence.teacher)
    )
    ids = rollout.ids_BT[mask][:, None]
    torch.testing.assert_close(found.ids_N, ids[:, 0])
    torch.testing.assert_close(found.student_logps_N, student.gather(-1, ids)[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.teacher_logps_N, teacher.gather(-1, ids)[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.entropy_N, -(teacher.exp() * teacher).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.stop_logps_N, teacher[:, 2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.top_logps_N, teacher.amax(-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.top_ids_N, teacher.argmax(-1))
    assert torch.equal(found.counted_N, ids[:, 0] != 5)
    assert torch.equal(found.log_ratio_N, found.student_logps_N - found.teacher_logps_N)


def test_rows_and_places_are_those_of_the_completions(make_evidence):
    evidence = make_evidence()
    found, rollout = evidence.readings, evidence.rollout
    assert torch.equal(rollout.ids_BT[found.row_N, found.place_N], found.ids_N)
    assert torch.equal(found.row_N.bincount(), rollout.real_BT.sum(1))
