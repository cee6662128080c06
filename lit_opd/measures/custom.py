"""Add a user's own yardstick: a function of both models' distributions at every token.

Why here: `register_measure` puts it into the table, so that it is averaged, drawn, reported and compared like the
built-in ones. The configuration names the function in `evaluation.measures`; `lit_opd.evaluation` loads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lit_opd.errors import UserError, choose
from lit_opd.measures.table import MEASURES, NATS, Better, Measure
from lit_opd.plugins import calling, import_object

__all__ = ["TokenMeasure", "apply_measures", "load_measures", "register_measure"]

# (student_logps_cV, teacher_logps_cV, ids_c) -> values_c, for a chunk of c tokens that the student wrote.
TokenMeasure = Callable[[Tensor, Tensor, Tensor], Tensor]

KEY = "evaluation.measures"
_BUILT_IN = frozenset(MEASURES)
_REGISTERED: dict[str, TokenMeasure] = {}


def register_measure(
    name: str, *, title: str = "", unit: str = NATS, better: Better | None = None
) -> Callable[[TokenMeasure], TokenMeasure]:
    """Register a per-token function as a yardstick, logged as `val/NAME`.

    The function gets the log-probabilities of student and teacher, [c, V] each, at temperature 1, and the tokens [c]
    that the student wrote, and returns a value [c] of each token.

    Args:
        name: how it is logged, without a slash.
        title: its name in words; by default made from `name`.
        unit: of the values.
        better: `lower` or `higher`; None where neither is, so that nothing is ranked by it.

    Raises:
        UserError: a name that is taken or has a slash; an unknown direction.

    >>> @register_measure("widest_gap", unit="probability", better="lower")
    ... def widest_gap(student_logps_cV, teacher_logps_cV, ids_c):
    ...     return (student_logps_cV.exp() - teacher_logps_cV.exp()).abs().amax(-1)
    """
    where = f"register_measure({name!r})"
    if better is not None:
        choose(f"{where}.better", better, ("lower", "higher"))
    if name in _BUILT_IN or "/" in name:
        raise UserError(where, "a new name without a slash", repr(name), "Choose another name.")

    def register(function: TokenMeasure) -> TokenMeasure:
        taken = _REGISTERED.get(name)
        if taken is not None and inspect.getsourcefile(taken) != inspect.getsourcefile(function):
            raise UserError(where, "a new name", "one that another file has registered", "Choose another name.")
        MEASURES[name] = Measure(title or name.replace("_", " "), unit, better)
        _REGISTERED[name] = function
        return function

    return register


def load_measures(references: Iterable[str]) -> dict[str, TokenMeasure]:
    """Import the functions that `evaluation.measures` names, each under the name it is registered by.

    Raises:
        UserError: no such file or function, or one that is not registered.
    """
    found = {}
    for reference in references:
        function = import_object(KEY, reference)
        name = next((name for name, registered in _REGISTERED.items() if registered is function), None)
        if name is None:
            remedy = "Decorate it with lit_opd.measures.register_measure(NAME)."
            raise UserError(KEY, "a registered measure", f"{reference!r}, which is not", remedy)
        found[name] = function
    return found


def apply_measures(
    measures: Mapping[str, TokenMeasure], student_cV: Tensor, teacher_cV: Tensor, ids_c: Tensor
) -> dict[str, Tensor]:
    """Call a user's measures on a chunk of c tokens, with log-probabilities [c, V] of both models.

    Raises:
        UserError: one that does not return a value for every token.
    """
    values = {}
    for name, measure in measures.items():
        with calling(KEY, f"{name!r} to run"):
            values[name] = value = measure(student_cV, teacher_cV, ids_c)
        if not isinstance(value, Tensor) or value.shape != ids_c.shape:
            expected = f"a tensor of shape {list(ids_c.shape)} from {name!r}, a value for every token"
            found = str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(KEY, expected, found, "Correct the function.")
    return values
