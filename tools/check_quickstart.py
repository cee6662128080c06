"""Holds the quickstart to its promise: the student starts at 0.45 at most and reaches 0.9 of the teacher's accuracy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HIGHEST_START = 0.45
SHARE_OF_TEACHER = 0.9


def main() -> int:
    """Read a summary.json; 0 where the promise holds, 1 where it does not."""
    summary = json.loads(Path(sys.argv[1]).read_text())
    before, after, teacher = (summary[name]["accuracy"]["mean"] for name in ("before", "after", "teacher"))
    print(f"accuracy: before {before:.3f}, after {after:.3f}, teacher {teacher:.3f}")
    return 0 if before <= HIGHEST_START and after >= SHARE_OF_TEACHER * teacher else 1


if __name__ == "__main__":
    sys.exit(main())
