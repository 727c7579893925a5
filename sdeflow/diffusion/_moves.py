r"""What moves the state between the steps of a sampler: ``Langevin`` corrects it, ``Replacement`` and ``DPS`` bind it.

At every time of the grid the corrector runs before the step, and the constraint after each of its updates and after the
step; at the start the constraint alone (Song et al., Score-based generative modeling through SDEs, ICLR 2021):

    x <- corrector(t_i, x), x <- constraint(t_i, x)        as often as the corrector says
    x <- step(t_i -> t_{i+1}, x), x <- constraint(t_{i+1}, x).
"""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete
from ..grids._build import check_count
from ._denoiser import AbstractDenoiser
from ._schedule import number
from ._whole import axes_of_sample, check_sample_ndim

NORMS = ("expected", "sample", "batch")


class AbstractCorrector(eqx.Module):
    """The base class of correctors: moves at one time, which keep the law of the state there."""

    num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, denoiser: AbstractDenoiser, t: Any, x: Array, args: Any, key: PRNGKeyArray) -> Array:
        """One update of the state x at time t."""


class AbstractConstraint(eqx.Module):
    """The base class of constraints: moves that pull the state towards what is known of the data."""

    draws: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: Any,
        x: Array,
        args: Any,
        key: PRNGKeyArray | None,
        before: tuple[Any, Array] | None,
    ) -> Array:
        """The state x at time t, bound.

        Arguments:
            denoiser: what predicts the data.
            t: the time.
            x: the state.
            args: passed on to the denoiser.
            key: a random key; None where the constraint does not draw.
            before: after a step, the time and the state where it began; None after a corrector and at the start.
        """


class Langevin(AbstractCorrector):
    r"""Unadjusted Langevin steps towards the law of the state at time t.

        x <- x + e score + sqrt(2 e) z,        e = 2 (snr |z| / |score|)^2.

    Its bias does not vanish with the number of steps: around N(0, v) with a constant e their variance is v / (1 - e /
    (2 v)). By default |z| / |score| is sigma, as for pure noise, so that e = 2 (snr sigma)^2 does not depend on the
    state. Norms make larger steps where the score is smaller, at low noise, but couple e to z and x: a further bias,
    small for large states only (in the plane it makes samples useless). Means of norms over a batch, as in official
    code, are safe for any state, but couple the samples of the batch.

    Arguments:
        snr: the ratio of sizes above; .16 is usual.
        num_steps: how many updates at each time.
        norms: "expected", "sample" (those of the whole state), or "batch" (means over its first axis, for a batch in
            ``x_T`` with a batch-wise denoiser).
        sample_ndim: for "sample", how many axes one sample has, the last ones of the state; None for all of them, as
            under ``jax.vmap``.

    Raises:
        ValueError: for a ratio or a number of steps that is not positive, or unknown norms.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)  # data with variance 1
        >>> x = sf.diffusion.sample(normal, jnp.ones(2), solver=sf.diffusion.DDIM(1.0), num_steps=5,
        ...                         corrector=sf.diffusion.Langevin(), key=jax.random.key(0))
        >>> x.shape
        (2,)
    """

    snr: float = eqx.field(default=0.16, static=True)
    num_steps: int = eqx.field(default=1, static=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    norms: Literal["expected", "sample", "batch"] = eqx.field(default="expected", static=True)
    sample_ndim: int | None = eqx.field(default=None, static=True)

    @property
    def looks_at_whole(self) -> bool:
        """Whether norms are those of one sample."""
        return self.norms == "sample"

    def __check_init__(self):
        check_sample_ndim(self.sample_ndim)
        if number(self.snr, "snr") <= 0:
            raise ValueError(f"snr must be positive, got {self.snr}.")
        check_count(self.num_steps, "num_steps")
        if self.norms not in NORMS:
            raise ValueError(f"norms must be one of {', '.join(map(repr, NORMS))}, got {self.norms!r}.")

    def __call__(self, denoiser: AbstractDenoiser, t: Any, x: Array, args: Any, key: PRNGKeyArray) -> Array:
        """One update of the state x at time t."""
        noise, sigma = denoiser.predict("noise", t, x, args), denoiser.schedule.sigma(t)
        z = jr.normal(key, x.shape, x.dtype)
        ratio = 1.0
        if self.norms == "sample":
            axes = axes_of_sample(x, self.sample_ndim)
            norm = lambda y: jnp.sqrt((y**2).sum(axis=axes, keepdims=True))
            ratio = norm(z) / norm(noise)
        elif self.norms == "batch":
            mean = lambda y: jnp.linalg.norm(y.reshape(y.shape[0], -1), axis=1).mean()
            ratio = mean(z) / mean(noise)
        # In terms of the noise the score is -noise / sigma; root is sqrt(2 e) / sigma.
        root = 2 * self.snr * ratio
        return x - sigma * (root**2 / 2 * noise - root * z)


class Replacement(AbstractConstraint):
    r"""Inpainting: what is known is overwritten with a fresh noisy copy, ``mean + alpha (value - mean) + sigma z``.

    Biased, whatever the number of steps: what is not known never hears of what is known but through the denoiser, so
    that of two normal components with correlation .8, one observed at 1, the other has mean .5 and variance .5 instead
    of .8 and .36. Langevin steps at each time take the bias away, one at each of 1000 times with norms of the batch to
    .80 and .37; with expected norms five
    of them leave .76 and .38.

    Arguments:
        value: the known data, which broadcasts to the state; what is not known may hold anything finite.
        known: which components are known, a boolean array that broadcasts to the state.
        basis: an orthonormal matrix Q: the components are those of ``x @ Q``, along the last axis. Colourisation knows
            the first of three channels, with (1, 1, 1) / sqrt(3) for the first column.

    Raises:
        TypeError: if ``known`` is not boolean.
        ValueError: if the basis is not square or not orthonormal.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)
        >>> first = sf.diffusion.Replacement(jnp.array([2.0, 0.0]), jnp.array([True, False]))
        >>> x = sf.diffusion.sample(normal, jnp.ones(2), solver=sf.diffusion.DDIM(1.0), num_steps=20, t_end=0.0,
        ...                         corrector=sf.diffusion.Langevin(), constraint=first, key=jax.random.key(0))
        >>> float(x[0])
        2.0
    """

    value: Array
    known: Array
    basis: Array | None

    def __init__(self, value: Any, known: Any, basis: Any = None):
        self.value, self.known = jnp.asarray(value), jnp.asarray(known)
        self.basis = None if basis is None else jnp.asarray(basis)
        if self.known.dtype != bool:
            raise TypeError(f"known must be boolean, got {self.known.dtype}.")
        if basis is not None and (np.ndim(basis) != 2 or len(set(np.shape(basis))) > 1):
            raise ValueError(f"basis must be a square matrix, all of its columns, got shape {np.shape(basis)}.")
        if basis is not None and is_concrete(basis):
            matrix = np.asarray(basis, np.float64)
            if not np.allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-5):
                raise ValueError("basis must be a matrix with orthonormal columns.")

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: Any,
        x: Array,
        args: Any,
        key: PRNGKeyArray | None,
        before: tuple[Any, Array] | None,
    ) -> Array:
        """The state with what is known overwritten."""
        schedule = denoiser.schedule
        mean = jnp.asarray(schedule.mean, x.dtype)
        turn, back = lambda y: y, lambda y: y
        if self.basis is not None:
            q = self.basis.astype(x.dtype)
            turn, back = lambda y: y @ q, lambda y: y @ q.T
        value = turn(jnp.broadcast_to(self.value.astype(x.dtype) - mean, x.shape))
        z = jr.normal(key, x.shape, x.dtype)  # pyright: ignore[reportArgumentType]
        fresh = schedule.alpha(t) * value + schedule.sigma(t) * z
        return back(jnp.where(jnp.broadcast_to(self.known, x.shape), fresh, turn(x - mean))) + mean


class Moves(eqx.Module):
    """A corrector and a constraint along the rows of a table, on states less the schedule's mean."""

    denoiser: AbstractDenoiser
    corrector: AbstractCorrector | None
    constraint: AbstractConstraint | None
    times: Any
    rows: Any = None
    first: Any = None

    def for_rows(self, count: int, dtype: Any, key: PRNGKeyArray | None) -> "Moves":
        """With what each row takes: when it ends, and a key."""
        times = jnp.asarray(self.times, dtype)
        first = None if key is None else jr.fold_in(key, count)
        keys = None if key is None else jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(count))
        return Moves(self.denoiser, self.corrector, self.constraint, times[0], (times[1:], keys), first)

    def begin(self, x: Array, args: Any) -> Array:
        """The start, bound."""
        return self._bind(self.times, x, args, self.first, None)

    def before(self, row: Any, t: Any, x: Array, args: Any) -> Array:
        """The state before a step, corrected."""
        if self.corrector is None:
            return x

        def once(x: Array, key: Any) -> tuple[Array, None]:
            one, two = jr.split(key)
            x = self._moved(x, lambda x: self.corrector(self.denoiser, t, x, args, one))  # pyright: ignore
            return self._bind(t, x, args, two, None), None

        keys = jr.split(jr.fold_in(row[1], 0), self.corrector.num_steps)
        return jax.lax.scan(once, x, keys)[0] if len(keys) > 1 else once(x, keys[0])[0]

    def after(self, row: Any, x: Array, args: Any, before: tuple[Any, Array]) -> Array:
        """The state after a step, bound."""
        t_next, key = row
        key = None if key is None else jr.fold_in(key, 1)
        return self._bind(t_next, x, args, key, (before[0], before[1] + self._mean(x)))

    def _bind(self, t: Any, x: Array, args: Any, key: Any, before: Any) -> Array:
        if self.constraint is None:
            return x
        return self._moved(x, lambda x: self.constraint(self.denoiser, t, x, args, key, before))  # pyright: ignore

    def _moved(self, x: Array, move: Any) -> Array:
        mean = self._mean(x)
        return move(x + mean) - mean

    def _mean(self, x: Array) -> Array:
        return jnp.asarray(self.denoiser.schedule.mean, x.dtype)
