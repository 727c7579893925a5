"""Do the gradients agree? Those of several adjoints, with one another and with finite differences.

The slope of the loss along a direction d is, by the gradient, <dL/dp, d>, and by central differences

    D(s) = (L(p + s d) - L(p - s d)) / 2 s,      D_{j+1}(s) = (4^j D_j(s / 2) - D_j(s)) / (4^j - 1),

where the second formula (Richardson's) takes away one power of s^2 after another. Of all entries of that table the one
is taken that differs least from those it was made of, which also says how far it is to be trusted.

Source: Ridders, Accurate computation of F'(x) and F'(x) F''(x), 1982, Advances in Engineering Software 4(2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._discrete import DiscreteAdjoint
from ._reversible import ReversibleAdjoint

HALVINGS = 6  # rows of Richardson's table
UNSURE = 1e-2  # finite differences that are less certain than this, relative to a slope, judge nothing


class GradientCheck(eqx.Module):
    """What `check_gradients` found; printed, a table with a row for each adjoint.

    Attributes:
        names: the adjoints; the first is the one that the others are compared with.
        norms: (A,) the norms of their gradients.
        differences: (A,) the largest difference of an entry to the first adjoint's, relative to its largest entry.
        slopes: (A, K) the slopes along K directions, from the gradients.
        finite_slopes: (K,) the same from finite differences.
        finite_errors: (K,) how far those are to be trusted.
        verdicts: "okay", or what is wrong.
    """

    names: tuple[str, ...]
    norms: np.ndarray
    differences: np.ndarray
    slopes: np.ndarray
    finite_slopes: np.ndarray
    finite_errors: np.ndarray
    verdicts: tuple[str, ...]

    @property
    def okay(self) -> bool:
        """Whether all gradients agree with the first adjoint's and with finite differences."""
        return all(verdict == "okay" for verdict in self.verdicts)

    def __repr__(self) -> str:
        worst = np.abs(self.slopes - self.finite_slopes).argmax(axis=1)
        head = ("adjoint", "gradient norm", "difference", "slope", "finite difference", "verdict")
        rows: list[tuple[str, ...]] = [head]
        for i, name in enumerate(self.names):
            k = int(worst[i])
            pair = f"{self.slopes[i, k]:.8g}", f"{self.finite_slopes[k]:.8g} (+- {self.finite_errors[k]:.0e})"
            rows.append((name, f"{self.norms[i]:.6g}", f"{self.differences[i]:.1e}", *pair, self.verdicts[i]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows)


class _Seen:
    """Counts the solves that a function passes its adjoint to."""

    def __init__(self) -> None:
        self.count = 0


class _Probe(DiscreteAdjoint):
    """Stands in for an adjoint while a loss is traced, to see what it does with it."""

    seen: Any = eqx.field(default=None, static=True)

    def walk(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.count += 1
        return super().walk(*args, **kwargs)

    def loop(self, **kwargs: Any) -> Any:
        self.seen.count += 1
        if isinstance(kwargs["stepsize_controller"], diffrax.AbstractAdaptiveStepSizeController):
            raise ValueError(  # noqa: TRY004
                "Gradients of an adaptive solve cannot be checked against finite differences, as its steps move with "
                "the parameters and count as constants: fix them with dt0=, grid= or steps_per_interval=."
            )
        return super().loop(**kwargs)


def check_gradients(
    fn: Callable[[Any, diffrax.AbstractAdjoint], Array],
    params: PyTree,
    *,
    adjoints: Sequence[diffrax.AbstractAdjoint] | None = None,
    epsilon: float | None = None,
    num_directions: int = 3,
    rtol: float | None = None,
    key: PRNGKeyArray | None = None,
) -> GradientCheck:
    """Compare the gradients of a loss under several adjoints with one another and with finite differences.

    The slopes <dL/dp, d> are compared along random directions d of length one. Steps must be fixed: an adaptive solve
    moves its steps with the parameters, which finite differences see and gradients, by design, do not.

    Arguments:
        fn: ``fn(params, adjoint)``, a scalar; it must pass ``adjoint=adjoint`` to its solves, and draw its noise from
            the same key each time.
        params: any tree; its floating arrays are what the gradient is taken with respect to.
        adjoints: what to compare, the first being what the others are measured by. Default: `DiscreteAdjoint`, and
            `ReversibleAdjoint` where it takes the solver.
        epsilon: the largest step of the finite differences, relative to 1 + |params|. Default: the fifth root of the
            rounding unit, 7e-4 for float64 and 4e-2 for float32.
        num_directions: K, how many directions.
        rtol: the largest difference that is okay, relative to the gradient. Default: 1e-6 for float64, 2e-3 for
            float32.
        key: for the directions; default ``jax.random.key(0)``.

    Returns:
        A `GradientCheck`: ``.okay``, and a table when printed.

    Raises:
        ValueError: if ``fn`` is not scalar, takes adaptive steps, or passes its adjoint to no solve; if ``params`` has
            no floating array.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, rate: -rate * y)
        >>> loss = lambda rate, adjoint: sf.solve(decay, jnp.array(1.0), [0.0, 1.0], args=rate, dt0=0.1,
        ...                                       adjoint=adjoint).final
        >>> sf.check_gradients(loss, jnp.array(1.0)).okay
        True
    """
    moving, rest = eqx.partition(params, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(moving)
    if flat.size == 0:
        raise ValueError("params has no floating array to take a gradient with respect to: wrap numbers in jnp.array.")
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions!r}.")

    def loss(x: Array, adjoint: Any) -> Any:
        return fn(eqx.combine(unravel(x), rest), adjoint)

    _look_at(loss, flat)
    chosen = list(adjoints) if adjoints is not None else _default_adjoints(loss, flat)
    if not chosen:
        raise ValueError("adjoints is empty: name at least one, e.g. [sf.adjoints.DiscreteAdjoint()].")
    # The value is the same under every adjoint; that of the first is what finite differences are made of.
    value = jax.jit(lambda x: loss(x, chosen[0]))
    grads = np.stack([np.asarray(jax.jit(jax.grad(lambda x, a=a: loss(x, a)))(flat), np.float64) for a in chosen])

    unit = float(jnp.finfo(flat.dtype).eps)
    rtol = (1e-6 if unit < 1e-10 else 2e-3) if rtol is None else rtol
    step = (unit**0.2 if epsilon is None else epsilon) * (1 + float(jnp.linalg.norm(flat)))
    key = jax.random.key(0) if key is None else key
    directions = jax.random.normal(key, (num_directions, flat.size), flat.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    found = [_slope(value, flat, d, step) for d in directions]
    finite, errors = (np.asarray(x) for x in zip(*found))

    slopes = grads @ np.asarray(directions, np.float64).T
    norms = np.linalg.norm(grads, axis=1)
    tiny = np.finfo(np.float64).tiny
    differences = np.abs(grads - grads[0]).max(axis=1) / max(np.abs(grads[0]).max(), tiny)
    # How large the slope along a random direction usually is.
    size = max(norms[0], tiny) / flat.size**0.5
    verdicts = tuple(
        _verdict(differences[i], np.abs(slopes[i] - finite), errors, size, rtol) for i in range(len(chosen))
    )
    names = tuple(repr(a).replace("\n", "").replace("  ", "") for a in chosen)
    return GradientCheck(names, norms, differences, slopes, finite, errors, verdicts)


def _look_at(loss: Any, flat: Array) -> None:
    """Trace the loss once, to refuse what cannot be checked."""
    seen = _Seen()
    out = jax.eval_shape(lambda x: loss(x, _Probe(seen=seen)), flat)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"fn must return a floating scalar, but returned {eqx.tree_pformat(out)}.")
    if seen.count == 0:
        raise ValueError("fn passes its adjoint to no solve: hand it on, as in sf.solve(..., adjoint=adjoint).")


def _default_adjoints(loss: Any, flat: Array) -> list[Any]:
    try:
        jax.eval_shape(jax.grad(lambda x: loss(x, ReversibleAdjoint())), flat)
    except ValueError:
        return [DiscreteAdjoint()]
    return [DiscreteAdjoint(), ReversibleAdjoint()]


def _slope(value: Callable[[Array], Array], x: Array, direction: Array, step: float) -> tuple[float, float]:
    """The slope by Richardson's table, and the difference of the chosen entry to those it was made of."""
    best, error = float("nan"), float("inf")
    above: list[float] = []
    for i in range(HALVINGS):
        s = step / 2**i
        ends = [np.asarray(value(x + sign * s * direction), np.float64) for sign in (1, -1)]
        row = [float(ends[0] - ends[1]) / (2 * s)]
        for j, old in enumerate(above):
            row.append((4 ** (j + 1) * row[j] - old) / (4 ** (j + 1) - 1))
            gap = max(abs(row[j + 1] - row[j]), abs(row[j + 1] - old))
            if gap <= error:
                best, error = row[j + 1], gap
        above = row
    return best, error


def _verdict(difference: float, gaps: np.ndarray, errors: np.ndarray, size: float, rtol: float) -> str:
    if not difference <= rtol:
        return "not the first adjoint's gradient"
    if not (errors <= UNSURE * size).all():
        return "finite differences are unsure: try another epsilon"
    return "okay" if (gaps <= rtol * size + 4 * errors).all() else "not the slope of the loss"
