"""Equations whose solutions are known, as a table: one name, one equation, one closed form.

``PROBLEMS[name].exact(y0, t, w)`` is the solution at time t, given the value w of the driving Brownian motion there
(where the path of the solution depends on no more than that); ``mean`` and ``variance`` are those of its law.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import sdeflow as sf


class Problem(NamedTuple):
    """An equation, a start, and what is known about the solution at time t."""

    equation: Callable[[], Any]
    y0: float
    exact: Callable[[Any, Any, Any], Any] | None = None
    mean: Callable[[float], float] | None = None
    variance: Callable[[float], float] | None = None


MU, SIGMA = 0.5, 0.8
THETA, LEVEL, NOISE = 1.5, 0.4, 0.6


def _gbm() -> Any:
    return sf.equations.GeometricBrownianMotion(MU, SIGMA)


def _gbm_stratonovich() -> Any:
    """The same process as ``gbm``, written in the other calculus by hand."""
    drift = lambda t, y, args: (MU - SIGMA**2 / 2) * y
    return sf.SDE(drift, lambda t, y, args: SIGMA * y, interpretation="stratonovich")


def _ou() -> Any:
    return sf.equations.OrnsteinUhlenbeck(THETA, LEVEL, NOISE)


def _exact_gbm(y0: Any, t: Any, w: Any) -> Any:
    return y0 * jnp.exp((MU - SIGMA**2 / 2) * t + SIGMA * w)


def _gbm_variance(t: float) -> float:
    return float(jnp.exp(2 * MU * t) * jnp.expm1(SIGMA**2 * t))


def _sine() -> Any:
    """dX = -s^2/2 sin(X) cos(X)^3 dt + s cos(X)^2 dW (Ito): X = arctan(s W + tan X0)."""
    drift = lambda t, y, args: -(NOISE**2) * jnp.sin(y) * jnp.cos(y) ** 3
    return sf.SDE(drift, lambda t, y, args: NOISE * jnp.cos(y) ** 2)


PROBLEMS = {
    "decay": Problem(lambda: sf.ODE(lambda t, y, args: -y), 1.0, lambda y0, t, w: y0 * jnp.exp(-t)),
    "logistic": Problem(
        lambda: sf.ODE(lambda t, y, args: y * (1 - y)),
        0.2,
        lambda y0, t, w: y0 / (y0 + (1 - y0) * jnp.exp(-t)),
    ),
    "clock": Problem(lambda: sf.ODE(lambda t, y, args: y * jnp.cos(t)), 1.0, lambda y0, t, w: y0 * jnp.exp(jnp.sin(t))),
    "gbm": Problem(_gbm, 1.0, _exact_gbm, lambda t: float(jnp.exp(MU * t)), _gbm_variance),
    "gbm_stratonovich": Problem(_gbm_stratonovich, 1.0, _exact_gbm, lambda t: float(jnp.exp(MU * t)), _gbm_variance),
    "arctan": Problem(_sine, 0.3, lambda y0, t, w: jnp.arctan(NOISE * w + jnp.tan(y0))),
    "ou": Problem(
        _ou,
        1.0,
        None,
        lambda t: float(LEVEL + (1.0 - LEVEL) * jnp.exp(-THETA * t)),
        lambda t: float(NOISE**2 * -jnp.expm1(-2 * THETA * t) / (2 * THETA)),
    ),
}
