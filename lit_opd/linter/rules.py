"""Look, in one rule each, for the ways in which a run cannot do what it says.

Identities (I1, ...) are numbered as in `tests/estimators/oracle/test_identities.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from lit_opd.estimators import get, names
from lit_opd.linter.facts import Facts, Finding
from lit_opd.linter.probes import Probe
from lit_opd.types import Need

__all__ = ["RULES"]

Rule = Callable[[Facts], Finding | None]


def k1_as_loss(facts: Facts) -> Finding | None:
    """Refuse a loss that averages to no gradient and ignores the teacher, as the log-ratio itself does."""
    if name := _first(facts, lambda p: p.dead and p.ignores_teacher):
        return Finding(
            "k1_as_loss", "refuse", _key(facts), f"{name!r}, whose gradient does not depend on the teacher",
            "a loss whose expected gradient is not zero: a log-ratio that is differentiated leaves E[grad log p] = 0 "
            "over the student's samples (k1 as a loss, identity I1)",
            "Multiply log p by the detached log-ratio, as 'token' does, or take half its square.",
        )  # fmt: skip
    return None


def action_independent_advantage(facts: Facts) -> Finding | None:
    """Refuse a score function times something that does not depend on the sampled token."""
    if name := _first(facts, lambda p: p.dead and not p.ignores_teacher):
        return Finding(
            "action_independent_advantage", "refuse", _key(facts), f"{name!r}, whose expected gradient is zero",
            "an advantage that depends on the sampled token: any other is a baseline, as E[grad log p] = 0, and "
            "trains nothing (identity I6)",
            "Differentiate the divergence instead of rewarding its value, as 'full_vocab' and 'teacher_topk' do.",
        )  # fmt: skip
    return None


def renormalised_over_one_token(facts: Facts) -> Finding | None:
    """Refuse a renormalised support of one token, on which all distributions are equal."""
    if _first(facts, lambda p: p.silent and p.support_size == 1):
        return Finding(
            "renormalised_over_one_token", "refuse", "estimator.kwargs.k", "1",
            "at least 2: renormalised over one token any two distributions are equal, and the gradient is exactly zero "
            "(identity I14)",
            "Set estimator.kwargs.k=16, or do not renormalise.",
        )  # fmt: skip
    return None


def no_gradient(facts: Facts) -> Finding | None:
    """Warn of an estimator that no sample of small random models gives a gradient."""
    if name := _first(facts, lambda p: p.silent and p.support_size != 1):
        return Finding(
            "no_gradient", "warn", _key(facts), f"none with {name!r}",
            "a gradient from some sample of small random models", "Look for a detached loss or too narrow a limit.",
        )  # fmt: skip
    return None


def whitened_advantage(facts: Facts) -> Finding | None:
    """Refuse pure distillation whose gradient forgets how far apart the models are."""
    if "rewards" in facts.estimator.needs:
        return None
    if name := _first(facts, lambda p: p.whitened):
        return Finding(
            "whitened_advantage", "refuse", _key(facts),
            f"{name!r}, whose gradient stays the same when every log-ratio doubles",
            "an advantage in nats: brought to unit variance over a batch it loses the KL's level, and steps stay as "
            "large when student and teacher have met (SkyRL rejects it too)",
            "Do not divide by the standard deviation; optim.clip_norm bounds a step.",
        )  # fmt: skip
    return None


def sampler_is_not_student(facts: Facts) -> Finding | None:
    """Refuse another law than the student's where an estimator learns from what is sampled."""
    rollout, sampled, uncorrected = facts.rollout, _sampled(facts), _uncorrected(facts)
    if not sampled or rollout.temperature == 0:  # greedy is refused with the law, whatever else is set
        return None
    if uncorrected and rollout.temperature != 1:
        return Finding(
            "sampler_is_not_student", "refuse", "rollout.temperature", str(rollout.temperature),
            f"1 for {uncorrected[0]!r}: E[grad log p] = 0 holds over the student's own samples, and over any others a "
            "score function is biased (identity I6)", f"Set rollout.temperature=1{_or_corrected()}.",
        )  # fmt: skip
    for name, untruncated in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        value = getattr(rollout, name)
        if value == untruncated:
            continue
        why = "tokens that are never sampled leave E[grad log p] != 0 over the rest"
        if not uncorrected:
            why = "the ratio of student over sampler cannot bring back tokens that are never sampled"
        return Finding(
            "sampler_is_not_student", "refuse" if uncorrected else "warn", f"rollout.{name}", str(value),
            f"{untruncated:g} for {(uncorrected or sampled)[0]!r}: {why}",
            f"Set rollout.{name}={untruncated:g}, or use an estimator that does not learn from its samples, as "
            "'full_vocab'.",
        )  # fmt: skip
    if rollout.min_new_tokens:
        return Finding(
            "sampler_is_not_student", "warn", "rollout.min_new_tokens", str(rollout.min_new_tokens),
            f"0 for {sampled[0]!r}: forbidding stop tokens makes the first positions no samples of the student",
            "Set rollout.min_new_tokens=0.",
        )  # fmt: skip
    return None


def dropout_in_training(facts: Facts) -> Finding | None:
    """Refuse, or warn of, dropout that only the student that trains has, and tell where none is left in adapters."""
    student = facts.student
    if student is not None and student.dropout == "keep":
        name = next(iter(_uncorrected(facts) or _unbiased(facts)), "")
        return Finding(
            "dropout_in_training", "refuse" if name else "warn", "student.dropout", "keep",
            f"none{f' for {name!r}' if name else ''}: the sampler has no dropout, so that another student trains than "
            "the one that sampled (.1 moved the log-probability of a token by .15 to .30 nats), and its gradient is "
            "noisier", "Set student.dropout=none.",
        )  # fmt: skip
    if student is not None and (student.lora or {}).get("lora_dropout"):
        return Finding(
            "dropout_in_training", "warn", "student.lora.lora_dropout", str((student.lora or {})["lora_dropout"]),
            "0: student.dropout=none leaves out all dropout, that of adapters too",
            "Leave it out, or set student.dropout=keep.",
        )  # fmt: skip
    return None


def teacher_temperature(facts: Facts) -> Finding | None:
    """Warn of a target that is not the teacher that evaluations measure."""
    temperature = facts.teacher_temperature
    if temperature == 1:
        return None
    return Finding(
        "teacher_temperature", "warn", "teacher.temperature", str(temperature),
        "1, so that the student is drawn to the distribution that every evaluation compares it with",
        "Set teacher.temperature=1, or expect val/reverse_kl to stay above zero.",
    )  # fmt: skip


def stale_updates(facts: Facts) -> Finding | None:
    """Refuse several updates on one rollout where nothing corrects for the later ones, which are off-policy."""
    updates, uncorrected = facts.optim.updates_per_rollout, _uncorrected(facts)
    if updates == 1 or not uncorrected:
        return None
    return Finding(
        "stale_updates", "refuse", "optim.updates_per_rollout", str(updates),
        f"1 for {uncorrected[0]!r}: from the second update on, samples are those of an earlier student, and nothing "
        "corrects for it (AsyncOPD, arXiv:2606.24143: the reverse KL bears this worse than the forward)",
        f"Set optim.updates_per_rollout=1{_or_corrected()}.",
    )  # fmt: skip


def no_stop_signal(facts: Facts) -> Finding | None:
    """Refuse masked tokens that leave nothing to learn the end of a completion from."""
    if not facts.stop_ids or not facts.stop_ids <= facts.masked_ids:
        return None
    return Finding(
        "no_stop_signal", "refuse", "estimator.masked_tokens", f"all of them, {sorted(facts.stop_ids)}",
        "at least one token that ends a completion to be counted: without any, nothing teaches the student to stop "
        "(the code of arXiv:2603.25562 masks <|im_end|>, and with it the only stop signal)",
        "Take the stop token out of estimator.masked_tokens.",
    )  # fmt: skip


def credit_across_masked_tokens(facts: Facts) -> Finding | None:
    """Refuse, or warn of, masked tokens where the advantage of one token depends on other tokens."""
    masked = list(facts.masked_tokens)
    if not masked:
        return None
    if name := _first(facts, lambda p: p.leaks):
        return Finding(
            "credit_across_masked_tokens", "refuse", "estimator.masked_tokens", str(masked),
            f"none for {name!r}: what stands at masked positions changes the gradient of others, so that a special "
            "token's log-ratio of -58 leaks into them (seen in arXiv:2603.25562)",
            "Fill masked positions with zero before they are summed, as 'hybrid' does.",
        )  # fmt: skip
    if name := _first(facts, lambda p: p.couples):
        return Finding(
            "credit_across_masked_tokens", "warn", "estimator.masked_tokens", str(masked),
            f"none for {name!r}: its tokens are credited with others, and what is masked drops out of that credit, so "
            "that it is the return of another sequence",
            "Mask nothing, or use an estimator that judges each token for itself, as 'token'.",
        )  # fmt: skip
    return None


def one_completion(facts: Facts) -> Finding | None:
    """Refuse a comparison of the completions of a prompt where there is one."""
    if "groups" not in facts.estimator.needs or facts.rollout.num_completions > 1:
        return None
    return Finding(
        "one_completion", "refuse", "rollout.num_completions", "1",
        f"at least 2 for {facts.estimator.spec.name!r}: it compares the completions of one prompt, and a single one is "
        "left without another", "Set rollout.num_completions=4.",
    )  # fmt: skip


def no_demonstrations(facts: Facts) -> Finding | None:
    """Refuse a term that learns from demonstrations where the student writes everything itself."""
    if facts.rollout.demonstrated:
        return None
    if name := _first(facts, lambda p: p.taught):
        return Finding(
            "no_demonstrations", "refuse", "rollout.student_share", "1",
            f"below 1 for {name!r}: it learns from completions that the student did not write, and there are none",
            "Set rollout.student_share=0.8.",
        )  # fmt: skip
    return None


def unprobed(facts: Facts) -> Finding | None:
    """Warn of a function that fails on small models."""
    for tried in facts.probes:
        if tried.error:
            return Finding(
                "unprobed", "warn", _key(facts), tried.error,
                f"{tried.name!r} to run on a made-up batch in float64, so that its gradient can be checked",
                "Correct it, or know that it was not checked.",
            )  # fmt: skip
    return None


RULES: tuple[Rule, ...] = (
    k1_as_loss,
    action_independent_advantage,
    renormalised_over_one_token,
    whitened_advantage,
    sampler_is_not_student,
    stale_updates,
    no_stop_signal,
    one_completion,
    no_demonstrations,
    credit_across_masked_tokens,
    dropout_in_training,
    teacher_temperature,
    no_gradient,
    unprobed,
)


def _first(facts: Facts, holds: Callable[[Probe], bool]) -> str | None:
    """Name the first term of which something holds."""
    return next((probe.name for probe in facts.probes if holds(probe)), None)


def _key(facts: Facts) -> str:
    return "estimator.kwargs" if facts.estimator.parts else "estimator.name"


def _sampled(facts: Facts) -> list[str]:
    """Name the terms that learn from the chance of what was sampled."""
    return [term.estimator.spec.name for term in facts.estimator.terms if term.estimator.spec.on_policy]


def _uncorrected(facts: Facts) -> list[str]:
    """Name those of them that take the sampler to be the student."""
    if facts.estimator.spec.corrects:
        return []
    specs = [term.estimator.spec for term in facts.estimator.terms]
    return [spec.name for spec in specs if spec.on_policy and not spec.corrects]


def _unbiased(facts: Facts) -> list[str]:
    """Name the terms that promise the exact gradient of their target."""
    return [term.estimator.spec.name for term in facts.estimator.terms if term.estimator.contract.unbiased]


def _or_corrected() -> str:
    """Offer the remedy that keeps the configured value: registered estimators that weigh by student over sampler."""
    correcting = [name for name in names() if get(name).corrects and get(name).needs == {Need.TOKEN}]
    return f", or use an estimator that weighs by student over sampler ({', '.join(correcting)})" if correcting else ""
