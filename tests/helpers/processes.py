"""Programs in processes of their own: their memory, and devices that only a new process can have."""

import os
import subprocess
import sys


def last_number(program, **environment):
    """What a program prints last, with more variables in its environment."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])
