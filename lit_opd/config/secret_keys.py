"""Find the secrets of a configuration, by their keys and by where they come from.

Why here: `errors.concealed` writes messages and records without them, and has to be told first. `reading` calls it with
every source, before anything of it can be printed.
"""

from __future__ import annotations

import os
import re
from typing import Any

from lit_opd.errors import keep_secret

__all__ = ["keep_secrets"]

ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
# Keys whose values are secret. Others that end in `token` name a token of a vocabulary, as `pad_token`.
SECRET_KEY = re.compile(
    r"((.*[_-])?(password|passwd|pwd|secret|credentials?|authorization|api_?key|access_?key|secret_?key|account_?key)"
    r"|((hf|hub|auth|use_auth|access|api|bearer|refresh|sas|session)_)?token)", re.I,
)  # fmt: skip


def keep_secrets(value: Any, key: str = "") -> None:
    """Have everything that is printed and recorded show the name of an environment variable, and no secret."""
    if isinstance(value, dict):
        for name, inner in value.items():
            keep_secrets(inner, str(name))
    elif isinstance(value, list):
        for inner in value:  # a list is no secret: the overrides of a comparison's variant may stand under `token`
            keep_secrets(inner)
    elif isinstance(value, str):
        for name in ENVIRONMENT.findall(value):
            if held := os.environ.get(name):
                keep_secret(held, f"${{oc.env:{name}}}")
        if SECRET_KEY.fullmatch(key) and value and "${" not in value:
            keep_secret(value)
