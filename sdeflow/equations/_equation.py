"""What moves: ``SDE`` and ``ODE``, and the base class of every equation.

    Ito:            dY = f(t, Y) dt + g(t, Y) dW
    Stratonovich:   dY = f(t, Y) dt + g(t, Y) o dW

and the two agree when f_Strat = f_Ito - 1/2 sum_j (dg_j/dy) g_j, the sum running over the columns of g.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ._chart import Chart
from ._terms import DiffusionTerm, DriftTerm

Interpretation = Literal["ito", "stratonovich"]


class AbstractEquation(eqx.Module):
    """The base class of every equation: a drift, perhaps a diffusion, and how its noise is to be understood.

    Subclasses provide ``drift(t, y, args)`` and, if they are driven by noise, ``diffusion(t, y, args)``; both as
    methods or as callable fields. ``additive`` says that the diffusion does not depend on the state.
    """

    interpretation: eqx.AbstractVar[str]
    additive: eqx.AbstractVar[bool]
    drift: eqx.AbstractVar[Callable[[Any, PyTree, Any], PyTree]]

    @property
    def is_stochastic(self) -> bool:
        """Whether the equation is driven by noise."""
        return getattr(self, "diffusion", None) is not None

    def terms(self, path: diffrax.AbstractPath | None = None) -> diffrax.AbstractTerm:
        """The diffrax terms of this equation, for ``diffrax.diffeqsolve`` or any diffrax solver.

        Arguments:
            path: what drives the equation; not used by an ordinary one.

        Raises:
            ValueError: if the equation is stochastic and no path is given.
        """
        if not self.is_stochastic:
            return DriftTerm(self.drift)
        if path is None:
            raise ValueError("A stochastic equation needs a path for its terms, e.g. sf.paths.GridBrownian(...).")
        return diffrax.MultiTerm(DriftTerm(self.drift), DiffusionTerm(self.diffusion, path))  # pyright: ignore

    def chart(self, y0: PyTree) -> Chart | None:
        """The coordinates in which `sdeflow.solve` walks this equation from ``y0``; None for its own."""
        del y0

    def to_ito(self, *, elementwise: bool = False) -> "AbstractEquation":
        """The same process in the Ito sense; see `to_stratonovich`."""
        return _converted(self, "ito", elementwise)

    def to_stratonovich(self, *, elementwise: bool = False) -> "AbstractEquation":
        """The same process in the Stratonovich sense: the drift loses half of sum_j (dg_j/dy) g_j.

        Arguments:
            elementwise: the diffusion is diagonal and its i-th entry depends on the i-th entry of the state alone.
                Then one Jacobian-vector product gives the correction; otherwise one is needed for each noise
                dimension.
        """
        return _converted(self, "stratonovich", elementwise)


class SDE(AbstractEquation):
    """A stochastic differential equation dY = f(t, Y, args) dt + g(t, Y, args) dW.

    Arguments:
        drift: ``f(t, y, args)``, returns exactly y's structure, shapes and dtypes.
        diffusion: ``g(t, y, args)``, returns an array (tree) of y's exact structure for diagonal noise, or a lineax
            operator from the noise to y.
        interpretation: "ito" or "stratonovich".
        additive: promise that g does not depend on y; then every solver is right for either interpretation.

    Raises:
        ValueError: for another interpretation.
        TypeError: if the drift or the diffusion is not callable.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.3 * jnp.ones_like(y), additive=True)
        >>> sol = sf.solve(sde, jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jax.random.key(0))
        >>> sol.final.shape
        (2,)
    """

    drift: Callable[[Any, PyTree, Any], PyTree]
    diffusion: Callable[[Any, PyTree, Any], Any]
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(
        self,
        drift: Callable[[Any, PyTree, Any], PyTree],
        diffusion: Callable[[Any, PyTree, Any], Any],
        *,
        interpretation: Interpretation = "ito",
        additive: bool = False,
    ):
        if interpretation not in ("ito", "stratonovich"):
            raise ValueError(f'interpretation must be "ito" or "stratonovich", got {interpretation!r}.')
        for name, fn in (("drift", drift), ("diffusion", diffusion)):
            if not callable(fn):
                raise TypeError(f"The {name} must be callable as {name}(t, y, args), got {type(fn).__name__}.")
        self.drift, self.diffusion = drift, diffusion
        self.interpretation, self.additive = interpretation, additive


class ODE(AbstractEquation):
    """An ordinary differential equation dy/dt = f(t, y, args).

    Arguments:
        vector_field: ``f(t, y, args)``, returns exactly y's structure, shapes and dtypes.

    Raises:
        TypeError: if the vector field is not callable.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> sol = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), [0.0, 1.0], dt0=0.1)
        >>> round(float(sol.final), 5)
        0.36788
    """

    drift: Callable[[Any, PyTree, Any], PyTree]
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    additive: ClassVar[bool] = True  # pyright: ignore

    def __init__(self, vector_field: Callable[[Any, PyTree, Any], PyTree]):
        if not callable(vector_field):
            raise TypeError(f"The vector field must be callable as f(t, y, args), got {type(vector_field).__name__}.")
        self.drift = vector_field


def _converted(equation: AbstractEquation, interpretation: Interpretation, elementwise: bool) -> AbstractEquation:
    if not equation.is_stochastic or equation.additive or equation.interpretation == interpretation:
        if not equation.is_stochastic or equation.interpretation == interpretation:
            return equation
        return SDE(equation.drift, equation.diffusion, interpretation=interpretation, additive=True)  # pyright: ignore
    sign = 1.0 if interpretation == "ito" else -1.0
    drift = _Corrected(equation, sign, elementwise)
    return SDE(drift, equation.diffusion, interpretation=interpretation)  # pyright: ignore


class _Corrected(eqx.Module):
    equation: AbstractEquation
    sign: float = eqx.field(static=True)
    elementwise: bool = eqx.field(static=True)

    def __call__(self, t: Any, y: PyTree, args: Any) -> PyTree:
        f = self.equation.drift(t, y, args)
        correction = stratonovich_correction(self.equation.diffusion, t, y, args, self.elementwise)  # pyright: ignore
        return jtu.tree_map(lambda a, c: a + self.sign * c, f, correction)


def stratonovich_correction(diffusion: Callable, t: Any, y: PyTree, args: Any, elementwise: bool = False) -> PyTree:
    """Half of sum_j (dg_j/dy) g_j, g_j the columns of the diffusion: Ito drift minus Stratonovich drift."""
    g = lambda y: diffusion(t, y, args)
    half = lambda tree: jtu.tree_map(lambda x: x / 2, tree)
    value = g(y)
    if elementwise:
        if isinstance(value, lx.AbstractLinearOperator):
            raise ValueError("elementwise=True needs a diagonal diffusion, but it returned a lineax operator.")
        return half(jax.jvp(g, (y,), (value,))[1])
    if isinstance(value, lx.AbstractLinearOperator):
        structure, apply = value.in_structure(), lambda y, e: g(y).mv(e)
    else:
        structure, apply = y, lambda y, e: jtu.tree_map(jnp.multiply, g(y), e)
    flat, unravel = ravel_pytree(jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structure))

    def column(e: Any) -> PyTree:
        at = lambda y: apply(y, unravel(e))
        return jax.jvp(at, (y,), (at(y),))[1]

    columns = jax.vmap(column)(jnp.eye(flat.size, dtype=flat.dtype))
    return half(jtu.tree_map(lambda x: x.sum(axis=0), columns))
