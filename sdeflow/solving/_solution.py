"""What a solve returns."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import is_concrete, values_of
from .._results import RESULTS, is_okay, message_of, promote
from ._dense import Dense


class Solution(eqx.Module):
    """The solution of a differential equation at the requested times.

    Attributes:
        ts: shape (n,), the requested times; with ``save="steps"`` the start and the end of every step, then infinities.
        ys: the states there (or what ``save_fn`` made of them), leaves (n, *shape); ``ys[0]`` is the start.
        final: the state at the last time, as the solver left it.
        stats: "num_steps" taken, "nfe", the number of drift evaluations (None if the solver is not known), and
            "time_reached", where the solve ended. Where diffrax took the steps, also "num_rejected".
        penalties: class name -> scalar, what each regulariser charged.
        result: a member of `sdeflow.RESULTS`; read it with `sdeflow.is_okay`.
            After a failure ``ys`` beyond the time reached, ``final`` and every derivative are NaN (an integer that
            ``save_fn`` makes is the largest of its type); an event that ends a solve is no failure.
        last: the last accepted state, that of ``stats["time_reached"]``. It is ``final`` unless the solve failed. Where
            the fixed steps of an explicit solver became infinite or NaN, all of which are accepted, it is the last
            finite state at a requested time (with a ``save_fn``, the start).
        choices: what was chosen and why, as pairs of strings; printed by ``repr``.
        dense: with ``dense=True``, what `evaluate` reads.
    """

    ts: Array
    ys: PyTree[Array]
    final: PyTree[Array]
    stats: dict[str, Any]
    penalties: dict[str, Array]
    result: Any
    choices: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())
    last: PyTree[Array] = None
    dense: Dense | None = None

    def evaluate(self, t: Any) -> PyTree[Array]:
        """The solution between its steps, by the solver's own interpolation.

        Arguments:
            t: a time, or an array of times.

        Returns:
            What ``ys`` holds, leaves (*t.shape, *shape); NaN outside of what was solved.

        Raises:
            ValueError: unless the solve was asked for ``dense=True``.

        Example:
            >>> import jax.numpy as jnp, sdeflow as sf
            >>> sol = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), [0.0, 1.0], dense=True)
            >>> bool(abs(sol.evaluate(0.5) - jnp.exp(-0.5)) < 1e-3)
            True
        """
        if self.dense is None:
            raise ValueError("The solution is known at its requested times alone: pass dense=True to sf.solve.")
        return self.dense.evaluate(t)

    def __repr__(self) -> str:
        value = promote(self.result)
        raw = jtu.tree_leaves(value)
        if raw and not is_concrete(*raw):
            status = "traced"
        elif np.size(values_of(value)) > 1:
            good = int(np.asarray(is_okay(value)).sum())
            status = f"{good} of {np.size(values_of(value))} paths okay"
        else:
            status = "okay" if bool(is_okay(value)) else f"failed: {message_of(value)}"
        shape = eqx.tree_pformat(self.ys, width=10_000)
        lines = [f"Solution ({status})", f"  ys: {shape}"]
        if is_concrete(self.ts) and np.ndim(self.ts) == 1:
            times = np.asarray(self.ts)[np.isfinite(np.asarray(self.ts))]
            count, ends = len(times), " to ".join(f"{float(t):g}" for t in times[[0, -1]]) if len(times) else "nowhere"
            lines.append(f"  ts: {count} times from {ends}" if count > 1 else f"  ts: 1 time, {float(self.ts[0]):g}")
        lines += [f"  {name}: {text}" for name, text in self.choices]
        steps = self.stats.get("num_steps")
        if steps is not None and is_concrete(steps) and np.ndim(steps) == 0:
            nfe = self.stats.get("nfe")
            cost = "" if nfe is None else f", {int(nfe)} drift evaluations"
            lines.append(f"  cost: {int(steps)} steps{cost}")
        return "\n".join(lines)


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every inexact leaf is finite."""
    okay = jnp.array(True)
    for leaf in jtu.tree_leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            okay = okay & jnp.isfinite(leaf).all()
    return okay


def with_finite_check(result: Any, final: PyTree) -> Any:
    """The result, turned to ``nonfinite`` if the last state is not finite."""
    failed = is_okay(result) & ~all_finite(final)
    return RESULTS.where(failed, RESULTS.nonfinite, result)


def failure(sol: Solution) -> str:
    """The sentence of a failed eager solve, and where it failed.

    That is the last requested time at which the state was finite; where steps ran out or became too short, what they
    came to.
    """
    text = message_of(sol.result)
    if not is_concrete(sol.ts, sol.stats.get("time_reached"), *jtu.tree_leaves(sol.ys)):
        # Under `jax.grad` outside of a compiled function the result is known, but the states are being traced.
        return text
    short = (message_of(RESULTS.max_steps_reached), message_of(RESULTS.dt_min_reached))
    if text in short and "time_reached" in sol.stats:
        return f"{text} {_progress(sol)}"
    if text == message_of(RESULTS.nonfinite):
        good = np.ones(np.shape(sol.ts), bool)
        for leaf in jtu.tree_leaves(sol.ys):
            leaf = np.asarray(leaf)
            if np.issubdtype(leaf.dtype, np.inexact):
                good &= np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
        times = np.asarray(sol.ts)[good]
        where = "at none of the requested times" if times.size == 0 else f"last at the requested time {times[-1]:g}"
        text += f" It was finite {where}."
    return text


def _progress(sol: Solution) -> str:
    start, end, reached = float(sol.ts[0]), float(sol.ts[-1]), float(sol.stats["time_reached"])
    accepted, rejected = int(sol.stats["num_steps"]), int(sol.stats["num_rejected"])
    if accepted == 0 or not np.isfinite(reached):
        return f"No step was accepted and {rejected} were rejected, from t={start:g} on."
    mean, done = (reached - start) / accepted, (reached - start) / (end - start)
    return (
        f"{accepted} steps were accepted and {rejected} rejected; of length dt={mean:.3g} on average, they went from "
        f"t={start:g} to t={reached:g}, {100 * done:.3g}% of the way to t={end:g}."
    )
