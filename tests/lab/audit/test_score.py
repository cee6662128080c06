from dataclasses import replace

import pytest
import torch

from lit_opd.lab.audit.score import sampler_gap, sampling_law
from lit_opd.types import SamplingLaw


@pytest.fixture(scope="module")
def evidence(make_evidence):
    """What the student itself sampled; no test changes it."""
    return make_evidence()


def test_the_students_own_samples_have_a_mean_score_of_zero(evidence):
    found = sampling_law(evidence)
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.numbers["p_value"] >= 0.01
    assert found.numbers["noise_ratio"] < 2


def test_samples_of_another_model_are_found_out(make_evidence, make_model):
    found = sampling_law(make_evidence(sampler=make_model(seed=5)))
    assert found.verdict in ("warn", "fail")
    assert found.numbers["noise_ratio"] > 1.5
    assert found.fix.startswith("The engine samples from another distribution")


def test_masked_tokens_do_not_hide_in_the_law(make_evidence, evidence):
    # What does not count was sampled all the same; without it the mean score would not be zero.
    masked, whole = sampling_law(make_evidence(masked=(5, 6, 7))), sampling_law(evidence)
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
def test_a_gap_is_graded_by_its_mean_size(evidence, with_readings, shift, verdict):
    positions = evidence.readings
    signs_N = torch.where(torch.arange(len(positions.ids_N)) % 2 == 0, 1.0, -1.0)
    found = sampler_gap(with_readings(evidence, sampler_logps_N=positions.law_logps_N + shift * signs_N))
    assert found.verdict == verdict
    assert found.numbers["mean_abs"] == pytest.approx(shift, rel=1e-3)
    assert (found.fix == "") == (verdict == "pass")


def test_the_effective_sample_size_is_of_whole_completions(evidence, with_readings):
    positions = evidence.readings
    # One completion is e^3 times as likely to the trainer as to the sampler.
    first_N = (positions.row_N == 0) & (positions.place_N == 0)
    found = sampler_gap(with_readings(evidence, sampler_logps_N=positions.law_logps_N - 3.0 * first_N))
    weights = torch.cat([torch.tensor([3.0]).exp(), torch.ones(63)])
    assert found.numbers["ess"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 64), rel=1e-3)


def test_where_every_token_has_its_end_forbidden_nothing_is_compared(evidence):
    rollout = replace(evidence.rollout, law=SamplingLaw(min_new_tokens=99))
    assert sampler_gap(replace(evidence, rollout=rollout)).verdict == "pass"


@pytest.mark.parametrize(("count", "verdict"), [(0, "pass"), (1, "pass"), (12, "warn"), (90, "fail")])
def test_tokens_that_the_trainers_law_excludes_are_graded_by_their_share(make_evidence, with_readings, count, verdict):
    evidence = make_evidence(law=SamplingLaw(top_p=0.9))
    law_logps_N = evidence.readings.law_logps_N.clone()
    law_logps_N[:count] = -torch.inf
    found = sampler_gap(with_readings(evidence, law_logps_N=law_logps_N))
    assert found.verdict == verdict
    assert found.numbers["excluded"] == pytest.approx(count / len(law_logps_N))
    assert found.numbers["max_abs"] < 1e-4, "of the tokens that both laws allow"
    assert ("none that the trainer's law allows" in found.found) == (count > 0)
    assert found.fix.startswith("Sample from the whole distribution (rollout.temperature above 0, top_p=1, "
                                "top_k=0, min_p=0)") == (verdict != "pass")  # fmt: skip
    # An excluded completion has no weight, and all others have one.
    kept = 1 - len(evidence.readings.row_N[:count].unique()) / len(evidence.rollout)
    assert found.numbers["ess"] == pytest.approx(kept, abs=1e-3)


def test_laws_without_a_token_in_common_fail(evidence, with_readings):
    nothing_N = torch.full_like(evidence.readings.law_logps_N, -torch.inf)
    found = sampler_gap(with_readings(evidence, law_logps_N=nothing_N))
    assert found.verdict == "fail"
    assert (found.numbers["excluded"], found.numbers["ess"]) == (1, 0)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_what_the_engine_cannot_have_sampled_fails(evidence, with_readings, value):
    sampler_logps_N = evidence.readings.sampler_logps_N.clone()
    sampler_logps_N[3] = value
    assert sampler_gap(with_readings(evidence, sampler_logps_N=sampler_logps_N)).verdict == "fail"
