"""The ODE-RNN: a state that flows between observations and is updated at them.

    h(t_i-) = flow of dh/dt = f(t, h) from h(t_{i-1}),      h(t_i) = GRU(h(t_i-), [x_i m_i, m_i])

where m_i says which channels were observed; where none was, h(t_i) = h(t_i-).

Source: Rubanova, Chen and Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019, arXiv 1907.03907.
"""

from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..._results import RESULTS
from ...solving import Solution, solve
from .._checks import check_size
from .._plain import NeuralODE


class ODERNN(eqx.Module):
    r"""An ordinary equation between observations and a gated recurrent unit at them; dynamics of a `SeriesModel`.

    Arguments:
        state_size: H, the length of h.
        control_size: C, the channels of the series.
        width, depth: hidden layers of the drift.
        mode: "pure", or "benchmark" for the networks of the published experiments.
        rate: the largest speed of the state between observations, 30 by default (1 in the benchmark mode).
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, or a rate that is not positive.

    Example:
        >>> import jax, sdeflow as sf
        >>> train, test = sf.data.simulated_series(12, num_channels=4, num_classes=3, key=jax.random.key(0))
        >>> dynamics = sf.models.ODERNN(8, control_size=4, key=jax.random.key(1))
        >>> model = sf.models.SeriesModel(dynamics, channels=4, num_outputs=3, key=jax.random.key(2))
        >>> model.predict(test, key=jax.random.key(3)).shape
        (12, 3)
    """

    flow: NeuralODE
    cell: eqx.nn.GRUCell
    state_size: int = eqx.field(static=True)
    control_size: int = eqx.field(static=True)

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        rate: float | None = None,
        key: PRNGKeyArray,
    ):
        flow, cell = jax.random.split(key)
        self.state_size, self.control_size = state_size, check_size("control_size", control_size)
        self.flow = NeuralODE(state_size, width=width, depth=depth, mode=mode, rate=rate, key=flow)
        self.cell = eqx.nn.GRUCell(2 * control_size, state_size, key=cell)

    def states(
        self,
        start: Float[Array, " H"],
        times: Float[Array, " L"],
        values: Float[Array, "L C"],
        *,
        solver: diffrax.AbstractSolver | None = None,
        steps_per_interval: int = 1,
        reverse: bool = False,
    ) -> Float[Array, "L H"]:
        """The state after each row, NaN meaning that a value was not observed.

        Arguments:
            start: the state before the first row (or the last one).
            times: increasing; repeats of the last time are padding if nothing is observed there.
            values: what was observed.
            solver: a diffrax solver for the flow, Euler by default.
            steps_per_interval: its steps between two rows.
            reverse: whether to run backwards in time.
        """
        solver = diffrax.Euler() if solver is None else solver

        def row(carry: Any, row: Any) -> Any:
            before, h = carry
            t, x = row
            h = solve(
                self.flow, h, jnp.stack([before, t]), steps_per_interval=steps_per_interval, solver=solver, throw=False
            ).final
            seen = ~jnp.isnan(x)
            new = self.cell(jnp.concatenate([jnp.where(seen, x, 0), seen.astype(h.dtype)]), h)
            h = jnp.where(seen.any(), new, h)
            return (t, h), h

        first = times[-1] if reverse else times[0]
        return jax.lax.scan(row, (first, start), (times, values), reverse=reverse)[1]

    def solution(
        self, start: Array, times: Array, values: Array, solver: diffrax.AbstractSolver, steps_per_interval: int
    ) -> Solution:
        """`states` as what a solve returns."""
        states = self.states(start, times, values, solver=solver, steps_per_interval=steps_per_interval)
        okay = jnp.isfinite(states).all()
        return Solution(times, states, states[-1], {}, {}, RESULTS.where(okay, RESULTS.successful, RESULTS.nonfinite))  # pyright: ignore
