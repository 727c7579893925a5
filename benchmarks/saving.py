"""Claim: keeping every step costs no more than it does in a hand-written scan that keeps every step.

The loss is the mean square over all n + 1 saved states; value and gradient, at the mid size.
"""

from . import sde_throughput
from ._harness import Claim, Options

TARGET = sde_throughput.Target("11", "mid", gradient=True, bound=1.1, save=True)


def run(options: Options) -> list[Claim]:
    """Measure the target."""
    return [sde_throughput.measure(TARGET, options)]
