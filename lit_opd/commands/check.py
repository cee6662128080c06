"""Hold an estimator to the laws and to what it declares, and say in words whose gradient it has.

The command `check` calls it, for somebody who writes an estimator. The laws themselves are `estimators.oracle`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lit_opd import estimators
from lit_opd.commands.describing import AT_EQUAL, print_contract, print_pairs, standard_console
from lit_opd.errors import RunError
from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.oracle.claims import CLAIMS
from lit_opd.estimators.oracle.laws import LAWS, broken_laws, cases, small_keywords, works_on_what_it_needs
from lit_opd.estimators.oracle.verdict import EXACT, Comparison, Verdict, verify

__all__ = ["check"]

_FIRST = works_on_what_it_needs.__name__

Broken = Mapping[str, Mapping[str, str]]
"""Which laws are broken, and how, by the keywords they are broken with."""


def check(reference: str, keywords: Mapping[str, Any]) -> None:
    """Print an estimator's contract, laws and gradient, and fail where it breaks one or its gradient is zero.

    Args:
        reference: a registered name, `package.module:function` or `path/to/file.py:function`.
        keywords: its keywords. Without any, the laws are asked of its variants too. Supports and limits are small where
            they are not given.
    """
    spec = estimators.get(reference)
    estimator = estimators.build(reference, **(small_keywords(spec) | dict(keywords)))
    console = standard_console()
    print_contract(console, spec, estimator.contract, _label(estimator))
    tried = [estimator] if keywords else [estimators.build(reference, **case) for case in cases(spec)]
    broken = {_label(case): broken_laws(case, _laws(spec)) for case in tried}
    _print_laws(console, spec, broken)
    failures = _broken_in_words(spec, broken)
    try:
        found = verify(estimator)
        numbers, faults = _gradient_in_words(found), _trains_nothing(found) or _goes_away(found)
    except Exception as error:  # whatever somebody's estimator raises
        failures = failures or [f"raises {type(error).__name__} on small models: {error}"]
    else:
        _print_gradient(console, found, numbers)
        failures += faults
    if failures:
        raise RunError(f"{reference} {', and '.join(failures)}.")


def _laws(spec: EstimatorSpec) -> dict[str, Any]:
    """Choose the laws to ask: what is not registered declares nothing."""
    declares = spec.name in estimators.names()
    return {name: law for name, law in LAWS.items() if declares or name not in CLAIMS}


def _label(estimator: BoundEstimator) -> str:
    return " ".join(f"{key}={value}" for key, value in estimator.kwargs.items())


def _print_laws(console: Console, spec: EstimatorSpec, broken: Broken) -> None:
    how_many = f" with {len(broken)} sets of keywords" if len(broken) > 1 else ""
    console.print(f"\nLaws{how_many}", style="bold")
    names = {name for laws in broken.values() for name in laws}
    held = [name.replace("_", " ") for name in _laws(spec) if name not in names]
    if _FIRST not in names:  # else the others were not asked
        print_pairs(console, {"held": ", ".join(held)})
    for label, laws in broken.items():
        for name, how in laws.items():
            where = f" (with {label})" if label and len(broken) > 1 else ""
            print_pairs(console, {"BROKEN": f"{name}{where}: {how}"}, style="red")


def _print_gradient(console: Console, found: Verdict, numbers: Mapping[str, str]) -> None:
    size = f"{found.pair.student_logits_CV.shape[1]} tokens, up to {found.pair.horizon} positions"
    console.print(f"\nGradient, exact on small models ({size})", style="bold")
    print_pairs(console, numbers)
    console.print()
    console.print(_comparisons(found))


def _gradient_in_words(found: Verdict) -> dict[str, str]:
    at_equal = "sample" if found.rms_at_equal < EXACT else "expectation" if found.norm_at_equal < EXACT else "never"
    return {
        "expected": _expected_in_words(found),
        "variance": f"{found.relative_variance:.3g} times that of the sampled reverse KL",
        "at p = q": AT_EQUAL[at_equal] + (f", norm {found.norm_at_equal:.3g}" if at_equal == "never" else ""),
        "samples": _action_in_words(found),
        "scale": "twice the log-ratios give the same gradient: how far the models are apart is lost"
                 if found.whitened else "",
    }  # fmt: skip


def _expected_in_words(found: Verdict) -> str:
    if reasons := _trains_nothing(found):
        return f"it {reasons[0]}"
    if _learns_from_demonstrations(found):
        return "zero over the student's own completions: it learns from demonstrations"
    if faults := _goes_away(found):
        return f"it {faults[0]}"
    best = found.nearest
    numbers = _beside(best)
    if best.relative_bias < EXACT:
        return f"its expected gradient is that of {best.target} {numbers}"
    if best.cosine > 1 - EXACT:
        return f"its expected gradient points exactly along that of {best.target}, at another length {numbers}"
    return f"its expected gradient is none of these; the nearest is that of {best.target} {numbers}"


def _action_in_words(found: Verdict) -> str:
    if not found.learns_from_samples:
        return "none: it learns from distributions, not from which token was sampled"
    if _learns_from_demonstrations(found):
        return "only demonstrations count"
    if found.action_independent:
        return "the factor of log p is the same whichever token was sampled, and so averages to nothing (identity I6)"
    return "the factor of log p depends on which token was sampled, as it must"


def _comparisons(found: Verdict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("  beside the gradient of", no_wrap=True)
    for name in ("cosine", "norm ratio", "relative bias"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in found.comparisons:
        bias = "0" if c.relative_bias < EXACT else f"{c.relative_bias:.3g}"
        table.add_row(f"  {c.target}", f"{c.cosine:.6f}", f"{c.norm_ratio:.3f}", bias)
    return table


def _broken_in_words(spec: EstimatorSpec, broken: Broken) -> list[str]:
    names = [name for name in _laws(spec) if any(name in laws for laws in broken.values())]
    first = next((laws[_FIRST] for laws in broken.values() if _FIRST in laws), "")  # the others were not asked
    how = f": {first}" if first else ""
    return [f"breaks {len(names)} of {len(_laws(spec))} laws: {', '.join(names)}{how}"] if names else []


def _learns_from_demonstrations(found: Verdict) -> bool:
    return found.silent and found.learns_from_samples


def _beside(comparison: Comparison) -> str:
    return f"(cosine {comparison.cosine:.6f}, norm ratio {comparison.norm_ratio:.3f})"


def _goes_away(found: Verdict) -> list[str]:
    """Find a sign that is wrong: an objective whose gradient is, up to its length, the negative of this one."""
    opposite = min(found.comparisons, key=lambda comparison: comparison.cosine)
    if opposite.cosine > EXACT - 1:
        return []
    return [f"has the opposite of the gradient of {opposite.target}: a sign is wrong {_beside(opposite)}"]


def _trains_nothing(found: Verdict) -> list[str]:
    if not (found.dead or found.silent) or _learns_from_demonstrations(found):
        return []
    if found.silent:
        return ["trains nothing: no sample has a gradient"]
    why = "its expected gradient is zero, though that of samples is not"
    if found.action_independent and found.ignores_teacher:
        why += "; like the log-ratio as a loss it never sees the teacher, and E[grad log p] = 0 (identity I1)"
    elif found.action_independent:
        why += "; what multiplies log p does not depend on the sampled token, and E[grad log p] = 0 (identity I6)"
    return [f"trains nothing: {why}"]
