"""All benchmarks, each in a process of its own; the exit code is 1 if a goal was missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULES = [*sorted(path.stem for path in Path(__file__).parent.glob("g[0-9]*.py")), "bank", "gpu"]

if __name__ == "__main__":
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode for name in MODULES]
    sys.exit(max(codes, default=0))
