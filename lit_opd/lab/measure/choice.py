"""Which estimators a measurement looks at, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_opd import estimators
from lit_opd.config import Config
from lit_opd.errors import UserError, suggest
from lit_opd.estimators import BoundEstimator
from lit_opd.rollout import training_law
from lit_opd.types import Need

__all__ = ["DEFAULT", "TARGETS", "check_supports", "chosen_estimators"]

# From every family: sampled, exact and truncated forms of the local reverse KL, and ways to the sequence's.
DEFAULT = (
    "full_vocab",
    "token",
    {"name": "clipped_log_ratio", "kwargs": {"max_log_ratio": 5.0}},
    "vopd",
    "k3_loss",
    "head_and_tail",
    "teacher_topk",
    "topk_tail_reverse_kl",
    {"name": "hybrid", "kwargs": {"gamma": 0.9}},
    "sequence",
    "leave_one_out",
    "rao_blackwell_return",
    "centred_rao_blackwell_return",
)
# Of each target an estimator whose expected gradient is exactly the target's, with little noise.
TARGETS = {
    "local": ("full_vocab", {"divergence": "reverse_kl"}),
    "sequence": ("exact_local_return", {}),
}
_KEYS = ("name", "kwargs", "label")


def chosen_estimators(config: Config) -> dict[str, BoundEstimator]:
    """What `measure.estimators` names, by label; without any, `DEFAULT` as far as the configuration allows.

    Raises:
        UserError: an entry that is neither a name nor a mapping, an unknown key, a label that comes twice, an estimator
            that learns from rewards without a verifier, one that compares completions where a prompt has one, or one
            that learns from what it samples under greedy sampling.
    """
    given, chosen = list(config.measure.estimators), {}
    for entry in given or DEFAULT:
        label, estimator = _build(entry)
        missing = _missing(config, estimator)
        if missing is not None and not given:
            continue
        if missing is not None:
            raise missing
        if label in chosen:
            raise UserError("measure.estimators", "labels that differ", f"{label!r} twice", "Give one a `label`.")
        chosen[label] = estimator
    return chosen


def _build(entry: Any) -> tuple[str, BoundEstimator]:
    if isinstance(entry, str):
        return entry, _named(entry)
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise UserError(
            "measure.estimators", "names, or mappings with `name`", repr(entry), "Write e.g. [token, vopd]."
        )
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"measure.estimators.{key}", "a known key", "an unknown one", suggest(str(key), _KEYS))
    keywords = dict(entry.get("kwargs") or {})
    label = " ".join([entry["name"], *(f"{name}={value}" for name, value in keywords.items())])
    return entry.get("label") or label, _named(entry["name"], **keywords)


def _named(name: str, **keywords: Any) -> BoundEstimator:
    """The estimator; what is wrong with it is told of the key that names it here."""
    try:
        return estimators.build(name, **keywords)
    except UserError as error:
        key = error.key.replace("estimator.name", "measure.estimators").replace("estimator.", "measure.estimators.")
        raise UserError(key, error.expected, error.found, error.remedy) from error


def _missing(config: Config, estimator: BoundEstimator) -> UserError | None:
    """What the configuration lacks for an estimator."""
    name = estimator.spec.name
    if Need.REWARDS in estimator.needs and config.data.verifier is None:
        return UserError("data.verifier", f"one: {name!r} learns from rewards", "null", "Set it.")
    if Need.GROUPS in estimator.needs and config.rollout.num_completions < 2:
        return UserError("rollout.num_completions", f"at least 2: {name!r} compares the completions of a prompt",
                         config.rollout.num_completions, "Raise it.")  # fmt: skip
    try:
        training_law(config.rollout, estimator)
    except UserError as error:
        return error
    return None


def check_supports(chosen: Mapping[str, BoundEstimator], vocabulary: int) -> None:
    """Look whether every support fits into the vocabulary.

    Raises:
        UserError: one that does not.
    """
    for label, estimator in chosen.items():
        if estimator.largest_support > vocabulary:
            raise UserError("measure.estimators", f"supports of at most the vocabulary ({vocabulary})",
                            f"{label!r} with {estimator.largest_support}", "Give it kwargs: {k: ...}.")  # fmt: skip
