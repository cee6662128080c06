"""Choose the estimators that a measurement looks at, and the targets that they are held against, for `experiment`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lit_opd import estimators
from lit_opd.config import Config
from lit_opd.errors import LintWarning, UserError, suggest
from lit_opd.estimators import BoundEstimator
from lit_opd.rollout import training_law
from lit_opd.teachers.combined import check_product
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
    """Build the estimators of `measure.estimators`, by label, or those of `DEFAULT` that the configuration allows.

    A product of teachers has a meaning for some of them only, and what is left out of `DEFAULT` for it is told.
    """
    given, chosen, meaningless = list(config.measure.estimators), {}, []
    for entry in given or DEFAULT:
        label, estimator = _build(entry)
        try:
            _check_needs(config, estimator)
        except UserError:
            if given:
                raise
            continue
        try:
            if config.teachers and config.teachers_combined == "product":
                check_product(estimator)
        except UserError:
            if given:
                raise
            meaningless.append(label)
            continue
        if label in chosen:
            raise UserError("measure.estimators", "labels that differ", f"{label!r} twice", "Give one a `label`.")
        chosen[label] = estimator
    if meaningless:
        told = f"left out, for teachers_combined=product is no sum of KLs for them: {', '.join(meaningless)}."
        warnings.warn(f"measure.estimators: {told}", LintWarning, stacklevel=2)
    return chosen


def _build(entry: Any) -> tuple[str, BoundEstimator]:
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or "name" not in entry:
        expected = "names, or mappings with `name`"
        raise UserError("measure.estimators", expected, repr(entry), "Write e.g. [token, vopd].")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"measure.estimators.{key}", "a known key", "an unknown one", suggest(str(key), _KEYS))
    keywords = dict(entry.get("kwargs") or {})
    label = " ".join([entry["name"], *(f"{name}={value}" for name, value in keywords.items())])
    try:
        return entry.get("label") or label, estimators.build(entry["name"], **keywords)
    except UserError as error:  # told of the key that names the estimator here
        key = error.key.replace("estimator.name", "measure.estimators").replace("estimator.", "measure.estimators.")
        raise UserError(key, error.expected, error.found, error.remedy) from error


def _check_needs(config: Config, estimator: BoundEstimator) -> None:
    """Refuse an estimator that needs a verifier, several completions or a sampling law that the configuration lacks."""
    name = estimator.spec.name
    if Need.REWARDS in estimator.needs and config.data.verifier is None:
        raise UserError("data.verifier", f"one: {name!r} learns from rewards", "null", "Set it.")
    if Need.GROUPS in estimator.needs and config.rollout.num_completions < 2:
        raise UserError("rollout.num_completions", f"at least 2: {name!r} compares the completions of a prompt",
                        config.rollout.num_completions, "Raise it.")  # fmt: skip
    training_law(config.rollout, estimator)


def check_supports(chosen: Mapping[str, BoundEstimator], vocabulary: int) -> None:
    """Refuse a support that does not fit into the vocabulary."""
    for label, estimator in chosen.items():
        if estimator.largest_support > vocabulary:
            raise UserError("measure.estimators", f"supports of at most the vocabulary ({vocabulary})",
                            f"{label!r} with {estimator.largest_support}", "Give it kwargs: {k: ...}.")  # fmt: skip
