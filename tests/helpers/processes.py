"""Programs in processes of their own: their memory, and devices that only a new process can have."""

import os
import subprocess
import sys

# The most memory that this program held at once, in GiB. What `resource` says is no less than what the process that
# started it held, as Linux carries that over; only where there is no /proc is it asked.
PEAK_GIB = """
import os, re, resource, sys
if os.path.exists("/proc/self/status"):
    peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
print(peak)
"""


def last_number(program, **environment):
    """What a program prints last, with more variables in its environment."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])
