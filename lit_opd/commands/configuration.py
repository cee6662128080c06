"""Print the configuration that a run would take, as YAML that `--config` reads, with where each value came from.

The command line calls it for `config`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_opd.config import to_yaml
from lit_opd.config.comments import with_comments
from lit_opd.config.origins import explained
from lit_opd.errors import concealed

__all__ = ["print_configuration"]


def print_configuration(files: Sequence[str], overrides: Sequence[str]) -> None:
    """Print every key: its value after files, overrides and interpolations, and the source of the value."""
    config, origins = explained(files, overrides)
    print(with_comments(to_yaml(config), {key: concealed(told) for key, told in origins.items()}), end="")
