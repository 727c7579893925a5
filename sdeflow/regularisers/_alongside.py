"""Integrals beside the state of an equation: y becomes (y, integrals), the noise stays what it was."""

from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..adjoints._freeze import freeze
from ..solvers import DiagonalMilstein, Exact, ExponentialHeun
from ..solvers._charging import beside
from ._measures import drift_of
from ._states import AbstractStateRegulariser

OF_THEIR_OWN = (
    DiagonalMilstein,
    Exact,
    ExponentialHeun,
    diffrax.ALIGN,
    diffrax.ShOULD,
    diffrax.QUICSORT,
    diffrax.SemiImplicitEuler,
)


def alongside(
    regularisers: Sequence[AbstractStateRegulariser],
    terms: Any,
    y0: PyTree,
    ts: Array,
    args: Any,
    key: Any,
    solver: Any,
) -> tuple[Any, Any]:
    """The terms and the start with the integrals beside the state.

    Arguments:
        ts: the requested times, whose direction is that of the solve.

    Raises:
        ValueError: for solvers that need terms of a kind of their own.
    """
    if isinstance(terms, tuple) or isinstance(solver, OF_THEIR_OWN):
        name = type(regularisers[0]).__name__
        raise ValueError(  # noqa: TRY004
            f"{type(solver).__name__} takes terms of its own kind, beside which {name} cannot be integrated: use "
            "another solver, or a regulariser that reads steps, e.g. sf.regularisers.LocalError()."
        )
    dtype = jnp.finfo(jnp.result_type(*jtu.tree_leaves(y0))).dtype
    drift = drift_of(terms, args)
    drawn = [r.draw(None if key is None else jax.random.fold_in(key, i), y0) for i, r in enumerate(regularisers)]

    # One sign for the whole solve: that of a step would be wrong in an adjoint which takes the steps backwards.
    direction = jnp.sign(freeze(ts[-1] - ts[0])).astype(dtype)

    def rates(t: Any, y: PyTree) -> tuple[Any, ...]:
        found = (jnp.asarray(r.rate(drift, t, y, d), dtype) for r, d in zip(regularisers, drawn))
        return tuple(x if r.signed else direction * x for r, x in zip(regularisers, found))

    nothing = tuple(jnp.zeros((), dtype) for _ in regularisers)
    return beside(terms, rates, nothing), (y0, nothing)
