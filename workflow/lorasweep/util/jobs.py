"""Ask a job of lorasweep in another environment."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from lorasweep.util.errors import InputError, find_reason


def ask(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Any:
    """Run `scripts/run STAGE -m lorasweep job NAME ...`, and return the value in its last line, which is JSON.

    Raises:
        InputError: the job failed; the message has its reason.
    """
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=environment
    )
    if result.returncode:
        lines = result.stderr.splitlines()
        raise InputError(find_reason(lines) or f"{command[5]} failed: {' '.join(lines[-1:]) or 'no error output'}")
    return json.loads(result.stdout.splitlines()[-1])
