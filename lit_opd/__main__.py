"""`python -m lit_opd`."""

from __future__ import annotations

import sys

from lit_opd.cli import main

if __name__ == "__main__":
    sys.exit(main())
