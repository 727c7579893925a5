"""Regularisers that read the steps of a solve: their error estimates and the stiffness that they met.

With h_j the length of step j, E_j the size of its error estimate and S_j the stiffness at its end (see ``_measures``):

    global error      R_E = sum_j E_j h_j          global stiffness      R_S = sum_j S_j

The global ones differentiate through the whole solve. The local ones charge one step of it, drawn at random:

    "unbiased" time: tau uniform in time, and the step that holds it;      "biased": a step uniform among all of n.

Then (t1 - t0) E_j and n E_j h_j are unbiased estimates of R_E (``weighting="sum"``), and E_j h_j itself is what the
paper charges (``weighting="paper"``). "Biased" is towards where steps are short. The step is taken once more outside of
the solve, from its recorded time and state, which count as constants: the gradient reaches the field alone.

Sources: Pal, Ma, Shah and Rackauckas, Opening the blackbox, ICML 2021, arXiv:2105.03918; Pal, Edelman and Rackauckas,
Locally regularized neural differential equations, ICML 2023, arXiv:2303.02262.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
from jaxtyping import Array

from ._base import AbstractRegulariser
from ._measures import Step, error_size, stiffness


class AbstractReader(AbstractRegulariser):
    """Reads steps. Subclasses say what a step is charged.

    Tolerances left out are those of an adaptive controller; on fixed steps they are ``rtol=0, atol=1``, so that the
    error itself is charged.
    """

    rtol: eqx.AbstractVar[float | None]
    atol: eqx.AbstractVar[float | None]

    def charge(self, step: Step) -> Array:
        """What a step adds to the global sum."""
        raise NotImplementedError


class _Global(AbstractReader):
    rtol: float | None = None
    atol: float | None = None
    aggregate: Literal["sum", "mean"] = eqx.field(default="sum", static=True)

    def __check_init__(self):
        if self.aggregate not in ("sum", "mean"):
            raise ValueError(f'aggregate must be "sum" or "mean", got {self.aggregate!r}.')


class GlobalError(_Global):
    """R_E = sum_j E_j h_j over all accepted steps, E_j the scaled size of the embedded error estimate.

    Under `sdeflow.adjoints.DiscreteAdjoint` (adaptive steps too) and diffrax's adjoints that differentiate the steps.

    Arguments:
        rtol, atol: the tolerances that errors are measured by; left out, the controller's, else 0 and 1.
        aggregate: "sum", or "mean" over the steps as in the code of the paper.

    Raises:
        ValueError: for another aggregate; while tracing, for a solver without an error estimate, and under an adjoint
            that does not see the steps.

    Source: Pal, Ma, Shah and Rackauckas, 2021.

    Example:
        >>> import diffrax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -1.3 * y)
        >>> sol = sf.solve(decay, jnp.array([2.0]), [0.0, 0.4], solver=diffrax.Tsit5(),
        ...                regularisers=(sf.regularisers.GlobalError(),))
        >>> bool(abs(sol.penalties["GlobalError"] - 1.5617e-5) < 1e-7)
        True
    """

    def charge(self, step: Step) -> Array:
        """E_j h_j."""
        return error_size(step) * step.length


class GlobalStiffness(_Global):
    """R_S = sum_j S_j over all accepted steps, S_j = |f(t1, y1) - f(t1, g)| / |y1 - g| at the end of step j.

    Arguments:
        rtol, atol: not used.
        aggregate: "sum" or "mean".

    Raises:
        ValueError: for another aggregate; while tracing, for a solver without an error estimate, and under an adjoint
            that does not see the steps.

    Source: Pal, Ma, Shah and Rackauckas, 2021.

    Example:
        >>> import diffrax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -1.3 * y)
        >>> sol = sf.solve(decay, jnp.array([2.0]), [0.0, 0.4], solver=diffrax.Tsit5(),
        ...                regularisers=(sf.regularisers.GlobalStiffness(),))
        >>> round(float(sol.penalties["GlobalStiffness"]), 2)
        1.3
    """

    def charge(self, step: Step) -> Array:
        """S_j."""
        return stiffness(step)


class _Local(AbstractReader):
    draws: ClassVar[bool] = True
    time: Literal["unbiased", "biased"] = eqx.field(default="unbiased", static=True)
    weighting: Literal["paper", "sum"] = eqx.field(default="paper", static=True)
    rtol: float | None = None
    atol: float | None = None
    detach_state: bool = eqx.field(default=True, static=True)
    detach_first_stage: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if self.time not in ("unbiased", "biased"):
            raise ValueError(f'time must be "unbiased" or "biased", got {self.time!r}.')
        if self.weighting not in ("paper", "sum"):
            raise ValueError(f'weighting must be "paper" or "sum", got {self.weighting!r}.')

    def weight(self, step: Step, count: Any, span: Any) -> Any:
        """What turns the charge of the drawn step into an unbiased estimate of the sum; 1 for the paper's weighting.

        Arguments:
            count: how many steps there were.
            span: from the first time to the last.
        """
        if self.weighting == "paper":
            return 1.0
        return count if self.time == "biased" else span / step.length


class LocalError(_Local):
    """E_j h_j of one step of the solve, drawn at random: cheap, and under any adjoint.

    Arguments:
        time: "unbiased" draws a time uniformly, "biased" a step, so that it dwells where steps are short.
        weighting: "paper" charges E_j h_j; "sum" makes it an unbiased estimate of `GlobalError`.
        rtol, atol: the tolerances that errors are measured by; left out, the controller's, else 0 and 1.
        detach_state: whether the state that the step starts from counts as a constant.
        detach_first_stage: whether the first slope counts as a constant too, as in the code of the paper; for
            tableaus whose last stage is the next step's first.

    Raises:
        ValueError: for another time or weighting; from ``solve`` without ``key=``; while tracing, for a solver without
            an error estimate.

    Source: Pal, Edelman and Rackauckas, 2023.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -1.3 * y)
        >>> sol = sf.solve(decay, jnp.array([2.0]), [0.0, 0.4, 0.8], solver=diffrax.Tsit5(), key=jax.random.key(0),
        ...                regularisers=(sf.regularisers.LocalError(),))
        >>> bool(0 < sol.penalties["LocalError"] < 2e-5)
        True
    """

    def charge(self, step: Step) -> Array:
        """E_j h_j."""
        return error_size(step) * step.length


class LocalStiffness(_Local):
    """S_j of one step of the solve, drawn at random: cheap, and under any adjoint.

    Arguments:
        time, weighting, rtol, atol, detach_state, detach_first_stage: as for `LocalError`.

    Raises:
        ValueError: as `LocalError`.

    Source: Pal, Edelman and Rackauckas, 2023.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -1.3 * y)
        >>> sol = sf.solve(decay, jnp.array([2.0]), [0.0, 0.4, 0.8], solver=diffrax.Tsit5(), key=jax.random.key(0),
        ...                regularisers=(sf.regularisers.LocalStiffness(),))
        >>> round(float(sol.penalties["LocalStiffness"]), 2)
        1.3
    """

    def charge(self, step: Step) -> Array:
        """S_j."""
        return stiffness(step)
