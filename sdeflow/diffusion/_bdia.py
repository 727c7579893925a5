r"""``BDIA``: a sampler that can be run backwards exactly, up to rounding (Zhang et al., ECCV 2024).

With D(n -> m | z) the increment of DDIM from knot n to knot m, at z_n,

    z_{n+1} = z_{n-1} - (1 - g) (z_{n-1} - z_n) - g D(n -> n-1 | z_n) + D(n -> n+1 | z_n),

which only asks for the output at z_n, so that z_{n-1} follows from z_n and z_{n+1}. The first step is one of DDIM. With
g = 1 it is an exponential leapfrog, of order 2 and exact backwards to rounding; with g < 1 it is of order 1 and N steps
back magnify rounding by g^-N.
"""

from typing import Any

import equinox as eqx
import numpy as np

from ._multistep import AbstractSampler
from ._schedule import AbstractSchedule, module_of, number
from ._table import Points, Table

# What came out of rounding errors in practice, as a multiple of g^-N times the unit roundoff.
MAGNIFIED = 30.0


class BDIA(AbstractSampler):
    """Bidirectional integration on top of DDIM; its state is a pair of neighbours.

    Arguments:
        gamma: g, above 0 and at most 1.

    Raises:
        ValueError: for another gamma.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> halved = sf.diffusion.Denoiser(lambda t, x, args: 0.5 * x, vp, prediction="data")
        >>> end = sf.diffusion.sample(halved, jnp.ones(2), solver=sf.diffusion.BDIA(), num_steps=10, return_state=True)
        >>> start = sf.diffusion.invert(halved, end, solver=sf.diffusion.BDIA(), num_steps=10)
        >>> bool(abs(start - 1).max() < 1e-5)
        True
    """

    gamma: float = eqx.field(default=1.0, static=True)

    def __check_init__(self):
        object.__setattr__(self, "gamma", number(self.gamma, "gamma"))
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}.")

    def table(self, schedule: AbstractSchedule, times: Any, grid: Any, num_steps: int | None = None) -> Table:
        """The table of this sampler: its first row is a step of DDIM, the others take a pair."""
        points = Points.along(schedule, times)
        xp, _ = module_of(points.l)
        keep, out = increment(points[:-1], points[1:])
        back_keep, back_out = increment(points[1:-1], points[:-2])
        shift = lambda x: xp.concatenate([xp.zeros_like(keep[:1]), x])
        g = self.gamma
        return Table(
            times[:-1],
            keep - g * shift(back_keep),
            (out - g * shift(back_out))[:, None],
            back=shift(xp.full_like(back_keep, g)),
        )

    def inverse(self, schedule: AbstractSchedule, times: Any) -> Table:
        """The table of the way back, over the same times reversed: row k takes a pair one knot further.

        Its first row is a step of DDIM, which starts from a single state; a pair starts with the second row.
        """
        table = self.table(schedule, times, None)
        first = Points.at(schedule, times[::-1])
        keep, out = increment(first[:1], first[1:2])
        xp, _ = module_of(keep)
        # z_{n-1} from z_n and z_{n+1}: rows 1 to N - 1 of the way there, last first.
        join = lambda one, rows: xp.concatenate([one, rows[:0:-1]])
        back = table.back
        safe = xp.where(back == 0, xp.ones_like(back), back)
        return Table(
            times[:0:-1],
            join(keep, -table.keep / safe),
            join(out[:, None], -table.out / safe[:, None]),
            back=join(xp.zeros_like(keep), 1 / safe),
        )


def increment(a: Points, b: Points) -> tuple[Any, Any]:
    """A step of DDIM from a to b: the factor of the state, and that of the noise."""
    xp, _ = module_of(a.l)
    keep = xp.exp(b.log_alpha - a.log_alpha)
    h = xp.where(b.clean, xp.zeros_like(b.l), b.l) - a.l
    return keep, xp.where(b.clean, -keep * xp.exp(a.log_sigma), -xp.exp(b.log_sigma) * xp.expm1(h))


def lost_digits(gamma: float, steps: int, dtype: Any) -> float:
    """The rounding error to expect after so many steps back, relative to the state."""
    with np.errstate(over="ignore"):
        return float(np.float64(gamma) ** -steps * np.finfo(dtype).eps * MAGNIFIED)
