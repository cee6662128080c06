"""Name the contrasts that a comparison can ask for: with the best, with a baseline, or of every two.

`grid` checks the key `contrasts` with it before anything runs, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from lit_opd.errors import UserError

__all__ = ["ALL", "TO_THE_BEST", "check_contrasts"]

TO_THE_BEST, ALL = "best", "all"


def check_contrasts(contrasts: str, variants: Iterable[str]) -> None:
    """Refuse a baseline that is none of the variants.

    Raises:
        UserError: it is none.
    """
    known = list(variants)
    if contrasts not in (TO_THE_BEST, ALL, *known):
        expected = f"best, all, or a baseline out of {', '.join(map(repr, known))}"
        raise UserError("contrasts", expected, repr(contrasts), "Name one of them.")
