"""An evaluation: fixed draws, temperature 1, examples to read; and what the module makes of it."""

import math

import numpy as np
import pytest
import torch

from lit_opd import DistillationModule
from lit_opd.config import EvaluationConfig
from lit_opd.errors import UserError
from lit_opd.evaluation import Evaluation, judge
from lit_opd.measures.table import YARDSTICKS
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine
from lit_opd.teachers import LocalScorer
from lit_opd.types import SamplingLaw


@pytest.fixture(scope="module")
def policies(make_model, tiny_tokenizer):
    return [LanguageModel(make_model(seed), tiny_tokenizer, key) for seed, key in ((1, "student"), (2, "teacher"))]


def scored(policies):
    student, teacher = policies
    return student, LocalScorer(teacher, rows=50)


def correct_if_short(completion, row):
    return float(len(completion) < 4 and row["answer"] == "1")


def evaluate(policies, batches, verifier=correct_if_short, **config):
    evaluation = Evaluation(EvaluationConfig(**config), max_new_tokens=8)
    for batch in batches:
        evaluation.add(*scored(policies), batch, LocalEngine(), verifier, rows=50)
    return evaluation.finish()


def test_results_do_not_depend_on_the_batches_nor_on_training_s_random_state(policies, make_batch):
    prompts = ["1+2=", "7=", "12-9+3=", "5+5="]
    torch.manual_seed(1)
    whole, _ = evaluate(policies, [make_batch(prompts)], num_completions=3, pass_at=[1, 3])
    torch.manual_seed(2)
    cut, _ = evaluate(policies, [make_batch([p]) for p in prompts], num_completions=3, pass_at=[1, 3])
    assert set(whole) == {*YARDSTICKS, "length", "truncated_frac", "accuracy", "pass_at_3"}
    for name, interval in whole.items():
        assert cut[name] == pytest.approx(interval, rel=1e-4, abs=1e-5)
    other, _ = evaluate(policies, [make_batch(prompts)], num_completions=3, seed=1)
    assert other["reverse_kl"].mean != whole["reverse_kl"].mean


def test_it_samples_at_temperature_one_untruncated(policies, make_batch):
    laws = []

    class Engine(LocalEngine):
        def sample(self, policy, batch, law, num_completions, uniforms_BT):
            laws.append((law, num_completions, uniforms_BT.shape))
            return super().sample(policy, batch, law, num_completions, uniforms_BT)

    evaluation = Evaluation(EvaluationConfig(num_completions=2), max_new_tokens=8)
    evaluation.add(*scored(policies), make_batch(), Engine(), None, rows=50)
    assert laws == [(SamplingLaw(), 2, (10, 8))]
    results, _ = evaluation.finish()
    assert "accuracy" not in results


def test_examples_to_read(policies, make_batch, full_logits, tiny_tokenizer):
    """As many as asked for, over batches; each token's log-ratio is that of a plain forward pass."""
    batches = [make_batch(["1+2=", "7="]), make_batch(["5+5="])]
    _, examples = evaluate(policies, batches, num_examples=3)
    assert [e.prompt for e in examples] == ["1+2=", "7=", "5+5="]
    assert len(evaluate(policies, batches, num_examples=2)[1]) == 2
    for example in examples:
        assert "".join(example.tokens) == example.completion
        assert len(example.tokens) == len(example.log_ratios)
        assert example.reward in (0.0, 1.0)
        prompt = tiny_tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        ids = tiny_tokenizer.convert_tokens_to_ids(example.tokens)
        logps = [p.model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                 for p in policies]  # fmt: skip
        ratios = (logps[0] - logps[1]).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert example.log_ratios == pytest.approx(ratios.tolist(), abs=2e-4)
    assert evaluate(policies, batches, verifier=None)[1][0].reward is None


def test_the_verifier_sees_text_without_special_tokens_and_its_own_row(policies, make_batch, sample):
    batch = make_batch(["1+2=", "7="])
    rollout = sample(policies[0].model, batch, SamplingLaw(), num_completions=3)
    seen = []

    def verifier(completion, row):
        seen.append((completion, row["prompt"]))
        return len(seen)

    rewards = judge(policies[0].tokenizer, batch, rollout, verifier)
    assert rewards.tolist() == [1, 2, 3, 4, 5, 6]
    assert rewards.dtype == torch.float32
    assert [prompt for _, prompt in seen] == ["1+2="] * 3 + ["7="] * 3
    assert not any("<" in text for text, _ in seen)


def test_the_module_logs_every_yardstick_with_its_interval(make_model, make_module, make_trainer, make_data):
    module, data = make_module(make_model(1), make_model(2), evaluation={"num_completions": 2}), make_data()
    trainer = make_trainer(limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
    for name, interval in module.results["val"].items():
        assert logged[f"val/{name}"] == pytest.approx(interval.mean, rel=1e-5)
        assert logged[f"val_interval/{name}_low"] == pytest.approx(interval.low, rel=1e-5)
        assert logged[f"val_interval/{name}_high"] == pytest.approx(interval.high, rel=1e-5)
    assert {"accuracy", "reverse_kl"} <= set(module.results["val"])
    assert len(module.examples) == 10
    assert module.measured_at == 0
    before = dict(module.results["val"])
    with module.judging_teacher():
        trainer.validate(module, data, verbose=False)
    assert module.results["teacher"]["reverse_kl"].mean == pytest.approx(0, abs=1e-6)
    assert module.results["val"] == before
    assert module.judged == "student"
    trainer.test(module, data, verbose=False)
    assert module.results["test"] == before
    assert not math.isnan(logged["val/accuracy"])


def test_training_leaves_the_measured_prompts_and_draws_alone(make_model, make_module, make_trainer, make_data):
    """The same student measures the same before and after another run's training."""
    module, data = make_module(make_model(1), make_model(2), optim={"lr": 1e-30}), make_data()
    trainer = make_trainer(2, limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    before = module.results["val"]
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    assert module.results["val"] == before


def test_what_is_kept_of_each_prompt_depends_on_no_other_prompt(policies, make_batch):
    """Measured alone, in a batch or in another order, a prompt gives the same."""
    prompts = ["1+2=", "7=", "12-9+3=", "5+5="]

    def kept(batches):
        evaluation = Evaluation(EvaluationConfig(num_completions=2), max_new_tokens=8)
        for texts in batches:
            evaluation.add(*scored(policies), make_batch(texts), LocalEngine(), correct_if_short, rows=50)
        results, _ = evaluation.finish()
        assert evaluation.per_prompt.sums.keys() == results.keys()
        return evaluation.per_prompt

    whole = kept([prompts])
    assert len(set(whole.sums["reverse_kl"])) == 4
    for batches in ([[p] for p in prompts], [prompts[::-1]], [prompts[2:], prompts[:2]]):
        cut = kept(batches)
        assert cut.numbers == whole.numbers == sorted(whole.numbers)
        for part in ("sums", "weights"):
            for name, values in getattr(whole, part).items():
                assert getattr(cut, part)[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def shared_tokens(curves, size):
    """Whether all overlaps together are a whole number of tokens of `size` at each position, and not all of them."""
    counted = curves.counts > 0
    tokens = size * (curves.means["overlap"] * curves.counts)[counted]
    assert tokens.sum() < size * curves.counts.sum()
    return np.allclose(tokens, tokens.round(), rtol=0, atol=1e-4)


def test_token_by_token_an_evaluation_sums_up_to_its_yardsticks(policies, make_batch):
    """In whatever batches, and forgotten with the next."""
    prompts = ["1+2=", "7=", "12-9+3=", "5+5="]
    evaluation = Evaluation(EvaluationConfig(num_completions=3), max_new_tokens=8, support_size=2)
    assert evaluation.profile is None
    for texts in (prompts, prompts[:2]):
        for text in texts:
            evaluation.add(*scored(policies), make_batch([text]), LocalEngine(), None, rows=50)
        results, _ = evaluation.finish()
        curves, log_ratios, tokens = *evaluation.profile, sum(evaluation.per_prompt.weights["reverse_kl"])
        assert curves.counts.sum() == log_ratios.counts.sum() == tokens
        assert curves.counts[0] == 3 * len(texts)
        for name in set(YARDSTICKS) & curves.means.keys():
            assert curves.mean(name) == pytest.approx(results[name].mean, rel=1e-5)
        assert shared_tokens(curves, 2)
        assert evaluation.to_log("val", results).keys() - evaluation.to_log("test", results).keys() >= {
            "position/reverse_kl_q1", "support/overlap", "support/student_mass", "support/teacher_mass",
        }  # fmt: skip


def test_the_module_measures_as_many_tokens_as_the_diagnostics_say(make_model, make_module, make_trainer, make_data):
    module = make_module(
        make_model(1), make_model(2), diagnostics={"support_size": 3}, evaluation={"max_new_tokens": 5}
    )
    trainer = make_trainer(limit_val_batches=1.0)
    trainer.validate(module, make_data(), verbose=False)
    curves = module.evaluation.profile.curves
    assert len(curves.counts) == 5
    assert shared_tokens(curves, 3)
    assert float(trainer.callback_metrics["position/log_ratio_q1"]) == pytest.approx(curves.mean("log_ratio", slice(2)))
    assert float(trainer.callback_metrics["support/student_mass"]) == pytest.approx(curves.mean("student_mass"))
    with module.judging_teacher():
        fresh = make_trainer(limit_val_batches=1.0)
        fresh.validate(module, make_data(), verbose=False)
    assert not [name for name in fresh.callback_metrics if name.startswith(("position/", "support/"))]


def test_a_support_of_no_token_is_refused(make_model, tiny_tokenizer):
    with pytest.raises(UserError, match="diagnostics.support_size"):
        DistillationModule(make_model(1), make_model(2), tokenizer=tiny_tokenizer, diagnostics={"support_size": 0})
