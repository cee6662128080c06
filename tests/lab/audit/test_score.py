from dataclasses import replace

import pytest
import torch

from lit_opd.lab.audit.score import sampler_gap, sampling_law
from lit_opd.types import SamplingLaw


def test_the_students_own_samples_have_a_mean_score_of_zero(make_evidence):
    found = sampling_law(make_evidence())
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.numbers["p_value"] >= 0.01
    assert found.numbers["noise_ratio"] < 2


def test_samples_of_another_model_are_found_out(make_evidence, make_model):
    found = sampling_law(make_evidence(sampler=make_model(seed=5)))
    assert found.verdict in ("warn", "fail")
    assert found.numbers["noise_ratio"] > 1.5
    assert found.fix.startswith("The engine samples from another distribution")


def test_masked_tokens_do_not_hide_in_the_law(make_evidence):
    # What does not count was sampled all the same; without it the mean score would not be zero.
    masked, whole = sampling_law(make_evidence(masked=(5, 6, 7))), sampling_law(make_evidence())
    assert masked.numbers == whole.numbers


def test_another_law_by_configuration_matters_to_who_learns_from_samples(make_evidence):
    law = SamplingLaw(top_p=0.7)
    found = sampling_law(make_evidence(law=law, estimator="token"))
    assert found.verdict == "warn"
    assert "'token' takes the student's own law for granted" in found.found
    assert found.fix.startswith("Set rollout.temperature=1")
    found = sampling_law(make_evidence(law=law, estimator="full_vocab"))
    assert (found.verdict, found.fix) == ("pass", "")
    assert "the estimator does not mind" in found.found


@pytest.mark.parametrize("law", [SamplingLaw(), SamplingLaw(temperature=0.7, top_p=0.9), SamplingLaw(min_new_tokens=3)])
def test_the_local_engine_has_no_gap_under_any_law(make_evidence, law):
    found = sampler_gap(make_evidence(law=law))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.numbers["max_abs"] < 1e-4
    assert found.numbers["ess"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("shift", "verdict"), [(0.01, "pass"), (0.05, "warn"), (0.5, "fail")])
def test_a_gap_is_graded_by_its_mean_size(make_evidence, with_positions, shift, verdict):
    evidence = make_evidence()
    positions = evidence.positions
    signs_N = torch.where(torch.arange(len(positions.ids_N)) % 2 == 0, 1.0, -1.0)
    found = sampler_gap(with_positions(evidence, sampler_logps_N=positions.law_logps_N + shift * signs_N))
    assert found.verdict == verdict
    assert found.numbers["mean_abs"] == pytest.approx(shift, rel=1e-3)
    assert (found.fix == "") == (verdict == "pass")


def test_the_effective_sample_size_is_of_whole_completions(make_evidence, with_positions):
    evidence = make_evidence()
    positions = evidence.positions
    # One completion is e^3 times as likely to the trainer as to the sampler.
    first_N = (positions.row_N == 0) & (positions.place_N == 0)
    found = sampler_gap(with_positions(evidence, sampler_logps_N=positions.law_logps_N - 3.0 * first_N))
    weights = torch.cat([torch.tensor([3.0]).exp(), torch.ones(63)])
    assert found.numbers["ess"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 64), rel=1e-3)


def test_where_every_token_has_its_end_forbidden_nothing_is_compared(make_evidence):
    evidence = make_evidence()
    rollout = replace(evidence.rollout, law=SamplingLaw(min_new_tokens=99))
    assert sampler_gap(replace(evidence, rollout=rollout)).verdict == "pass"
