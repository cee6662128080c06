"""Write numbers as JSON has them.

The reports of the experiments in `lab/` call it: Python would write NaN, which other readers of JSON refuse.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["finite"]


def finite(node: Any) -> Any:
    """Put null for every number that is not finite, for which JSON has no word. Tuples become lists."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
