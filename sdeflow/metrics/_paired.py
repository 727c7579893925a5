r"""``paired_difference``: whether one method scores better than another, judged repeat by repeat.

With d_r the difference of both scores in repeat r the mean difference lies, at the given level, in

    mean d +- q sqrt(var d / R),    q the quantile (1 + level) / 2 of Student's t with R - 1 degrees of freedom,

which is exact where the differences are normal (Student 1908). What is common to both scores in a repeat, such as how
hard its data happen to be, cancels.
"""

from typing import Any, NamedTuple

import numpy as np


class PairedDifference(NamedTuple):
    """A mean difference with its confidence interval.

    Arguments:
        mean: of the differences.
        low: the lower end of the interval.
        high: its upper end.

    Example:
        >>> from sdeflow.metrics import PairedDifference
        >>> PairedDifference(-0.5, -0.75, -0.25).decided
        True
    """

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether 0 lies outside of the interval; inside of it the two are tied."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_difference(x: Any, y: Any, *, level: float = 0.95) -> PairedDifference:
    r"""The mean of ``x - y`` over paired repeats, with Student's interval ``mean +- q sqrt(var / R)``.

    For evaluation: NumPy on the host, in float64. Negative means that x is smaller. Repeats on subsamples of one data
    set say how sure the mean is for that data set, and less than the interval claims of another one.

    Arguments:
        x: the scores of one method, shape (R,), at least two repeats.
        y: those of the other in the same repeats, shape (R,).
        level: of confidence, between 0 and 1.

    Returns:
        A `PairedDifference`.

    Raises:
        ValueError: if the scores are not two rows of as many finite numbers, or the level is not between 0 and 1.

    Example:
        >>> import sdeflow as sf
        >>> print(sf.metrics.paired_difference([1.0, 2.0, 3.0], [1.5, 2.0, 4.0]))
        -0.5000 [-1.7421, +0.7421]
    """
    from scipy.stats import t

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"x and y must be rows of as many scores, at least two, got shapes {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x and y must be finite; leave repeats that failed out of both.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    d = x - y
    half = float(t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    mean = float(d.mean())
    return PairedDifference(mean, mean - half, mean + half)
