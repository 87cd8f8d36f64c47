"""The project's own commands, run as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...` from the checkout and wait for its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )
