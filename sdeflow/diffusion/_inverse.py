r"""Guidance by what was observed: ``ClassifierGuided``, ``PosteriorGuided`` for linear measurements, and ``DPS``.

The score at time t given y is the score plus the gradient of log p_t(y | x_t) in x_t. For y = A x0 + noise_std n, with
x0^ what the denoiser predicts and J = dx0^/dx_t, it is approximated by

    J^T A^T (A C A^T + noise_std^2 I)^-1 (y - A x0^),      C an approximation of Cov(x0 | x_t):

| method | C | what is exact |
|---|---|---|
| "tmpd" | (sigma^2 / alpha) J, the covariance itself | normal data: all; other data: two moments |
| "pigdm" | r^2 I, r^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), s = data_std | independent components of deviation s |
| "point" | 0 | nothing |

Sources: Boys et al., Tweedie moment projected diffusions, 2023; Song et al., Pseudoinverse-guided diffusion models,
ICLR 2023; Chung et al., Diffusion posterior sampling, ICLR 2023, whose form in practice is `DPS`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete
from ._denoiser import AbstractDenoiser, Scale, as_scale, check_denoiser, scale_at
from ._moves import AbstractConstraint
from ._schedule import AbstractSchedule, number
from ._whole import check_sample_ndim

METHODS = ("tmpd", "pigdm", "point")
# Up to this many observations the equations are solved directly.
_DIRECT, _BLOCK = 512, 64  # ... and so many derivatives taken at once


class ClassifierGuided(AbstractDenoiser):
    """A denoiser whose score has ``scale`` times the gradient of a log-likelihood added.

    With scale 1 and the true log p_t(y | x_t) samplers draw from the data given y. With larger scales they draw from no
    known law: the densities at different t are not those of one diffusion. A classifier that never saw noise is biased
    at all t but the last.

    Arguments:
        denoiser: any denoiser.
        log_likelihood: ``log_likelihood(t, x, args)``, a scalar, for one sample x at time t.
        scale: of the gradient, a number or a function of t.

    Raises:
        TypeError: if the likelihood is not callable.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> edm = sf.diffusion.EDM()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: x / (1 + t**2), edm, prediction="data")
        >>> seen = sf.diffusion.ClassifierGuided(normal, lambda t, x, args: -((x - 1) ** 2) / 2)
        >>> float(seen.predict("score", 1.0, jnp.array(0.0)))
        1.0
    """

    denoiser: AbstractDenoiser
    log_likelihood: Callable[[Any, Array, Any], Array]
    scale: Scale

    def __init__(
        self, denoiser: AbstractDenoiser, log_likelihood: Callable[[Any, Array, Any], Array], scale: Any = 1.0
    ):
        check_denoiser(denoiser)
        if not callable(log_likelihood):
            raise TypeError(
                f"log_likelihood must be callable as log_likelihood(t, x, args), got {type(log_likelihood).__name__}."
            )
        self.denoiser, self.log_likelihood, self.scale = denoiser, log_likelihood, as_scale(scale)

    @property
    def schedule(self) -> AbstractSchedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the denoiser."""
        return self.denoiser.schedule

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The guided data, less the schedule's mean, and the guided noise."""
        push = jax.grad(lambda x: self.log_likelihood(t, x, args))(x)
        return _pushed(self.schedule, t, self.denoiser.parts(t, x, args), scale_at(self.scale, t, x) * push)


class PosteriorGuided(AbstractDenoiser):
    """A denoiser guided by a linear measurement y = A x0 + noise_std n, for every sampler and equation.

    Each evaluation costs one evaluation and one vector-Jacobian product of the denoiser, and with "tmpd" for each
    observation, or each iteration beyond 64 of them, two more products.

    How biased the methods are shows on N((1, -1), [[1, .8], [.8, 1]]), the first component observed at 2.2 with
    deviation .3, by 300 steps of ``DDIM(1.0)`` from 20 to .001 under EDM. The covariance is xx, xy, yy:

    | | mean | covariance |
    |---|---|---|
    | exact | 2.101, -.119 | .083, .066, .413 |
    | "tmpd" (error of the steps alone) | 2.101, -.120 | .080, .064, .400 |
    | "pigdm" | 2.074, -.165 | .088, .077, .422 |
    | "point" | 2.200, .163 | .043, .013, .307 |

    The Jacobian of a trained network is no covariance: it has negative eigenvalues, and equations made of it are nearly
    singular somewhere on the way. So "tmpd" takes the size of each eigenvalue, up to 512 observations. Beyond these it
    cannot, and may run away: look at ``y - A x0``, and take "pigdm" then.

    Arguments:
        denoiser: any denoiser, for one sample.
        operator: A, a matrix that acts on the flattened sample, or a linear function of a sample; an affine one,
            such as a change of scale, is as good.
        observed: y, an array like what A returns.
        noise_std: the deviation of the noise in y; 0 for none.
        method: "tmpd", "pigdm" or "point", which covariance of the data is assumed; see the table of the module.
        data_std: the deviation of the data, for "pigdm".
        scale: of the guidance, a number or a function of t; other than 1 only to leave the posterior on purpose.

    Raises:
        TypeError: for what is no operator, and, while tracing, for one that is not linear.
        ValueError: for unknown methods, negative deviations, or shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> edm = sf.diffusion.EDM()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: x / (1 + t**2), edm, prediction="data")
        >>> seen = sf.diffusion.PosteriorGuided(normal, jnp.array([[1.0, 0.0]]), jnp.array([2.0]), noise_std=1.0)
        >>> [round(v, 4) for v in seen.predict("data", 1.0, jnp.zeros(2)).tolist()]  # variance 1/2 left, 1 observed
        [0.6667, 0.0]
    """

    denoiser: AbstractDenoiser
    operator: Any
    observed: Array
    noise_std: Array
    data_std: Array
    scale: Scale
    method: str = eqx.field(static=True)

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        operator: Any,
        observed: Any,
        *,
        noise_std: Any,
        method: Literal["tmpd", "pigdm", "point"] = "tmpd",
        data_std: Any = 1.0,
        scale: Any = 1.0,
    ):
        check_denoiser(denoiser)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
        if is_concrete(noise_std) and number(noise_std, "noise_std") < 0:
            raise ValueError(f"noise_std must not be negative, got {noise_std}.")
        if is_concrete(noise_std) and noise_std == 0 and method == "point":
            raise ValueError('method="point" divides by noise_std: pass a positive one.')
        if is_concrete(data_std) and number(data_std, "data_std") <= 0:
            raise ValueError(f"data_std must be positive, got {data_std}.")
        self.denoiser, self.operator, self.observed = denoiser, _check_operator(operator), jnp.asarray(observed)
        self.noise_std, self.data_std = (jnp.asarray(a, jnp.result_type(a, float)) for a in (noise_std, data_std))
        self.scale = as_scale(scale)
        self.method = method

    @property
    def schedule(self) -> AbstractSchedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the denoiser."""
        return self.denoiser.schedule

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The guided data, less the schedule's mean, and the guided noise."""
        parts, push = jax.linearize(lambda x: self.denoiser.parts(t, x, args), x)
        # One vector-Jacobian product of the denoiser: the transpose of what is linear already.
        pull = lambda v: jax.linear_transpose(lambda u: push(u)[0], x)(v)[0]
        # A covariance is symmetric, and the Jacobian of a trained network only nearly so.
        symmetric = lambda v: (push(v)[0] + pull(v)) / 2
        schedule, dtype = self.schedule, x.dtype
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        observe, adjoint = _linear(self.operator, x, self.observed)
        residual = self.observed.astype(dtype) - observe(parts[0] + jnp.asarray(schedule.mean, dtype))
        # Of an affine function what moves with the sample is linear.
        still = observe(jnp.zeros_like(x))
        along = lambda v: observe(v) - still
        variance, s2 = self.noise_std.astype(dtype) ** 2, self.data_std.astype(dtype) ** 2
        if self.method == "point":
            weight = residual / variance
        else:
            if self.method == "pigdm":
                spread = lambda v: s2 * sigma**2 / (alpha**2 * s2 + sigma**2) * v
            else:
                spread = lambda v: sigma**2 / alpha * symmetric(v)
            weight = _solved(lambda w: along(spread(adjoint(w))), variance, residual)
        back = symmetric if self.method == "tmpd" else pull
        return _pushed(schedule, t, parts, scale_at(self.scale, t, x) * back(adjoint(weight)))


class DPS(AbstractConstraint):
    r"""Diffusion posterior sampling as its code does it: after each step, down the gradient of the norm of the misfit,

        x <- x - scale d/dx |y - A x0^(x)|,        at the state where the step began.

    No posterior sampler: the size does not shrink with the steps, the noise in y is not asked for, and correlations are
    lost. On the example of `PosteriorGuided` scale 1 gives the mean 2.20, .14 and the covariance .31, .01, .30 for
    2.10, -.12 and .083, .066, .413; scale .3 gives .030, .001, .294. Prefer `PosteriorGuided`.

    Arguments:
        operator: A, a matrix that acts on the flattened sample, or a linear function of a sample.
        observed: y, an array like what A returns.
        scale: of the gradient, a number or a function of the time before the step; the paper's step for the squared
            norm is twice this one.
        sample_ndim: how many axes one sample has, the last ones of the state; those before are a batch, in the state
            and in y alike. None for all axes, as under ``jax.vmap``.

    Raises:
        TypeError: for what is no operator.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)
        >>> seen = sf.diffusion.DPS(jnp.array([[1.0, 0.0]]), jnp.array([2.0]), 0.3)
        >>> x = sf.diffusion.sample(normal, jnp.ones(2), solver=sf.diffusion.DDIM(1.0), num_steps=200, constraint=seen,
        ...                         key=jax.random.key(0))
        >>> bool(abs(x[0] - 2) < 0.5)
        True
    """

    draws: ClassVar[bool] = False
    operator: Any
    observed: Array
    scale: Scale
    sample_ndim: int | None = eqx.field(static=True)

    def __init__(self, operator: Any, observed: Any, scale: Any = 1.0, *, sample_ndim: int | None = None):
        check_sample_ndim(sample_ndim)
        self.operator, self.observed = _check_operator(operator), jnp.asarray(observed)
        self.scale, self.sample_ndim = as_scale(scale), sample_ndim

    @property
    def looks_at_whole(self) -> bool:
        """Whether the shape of a sample is not known: a matrix fits one alone."""
        return callable(self.operator)

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: Any,
        x: Array,
        args: Any,
        key: PRNGKeyArray | None,
        before: tuple[Any, Array] | None,
    ) -> Array:
        """The state after a step, moved."""
        if before is None:
            return x
        observe, _ = _linear(self.operator, x, self.observed)

        def misfit(at: Array) -> Array:
            gap = self.observed.astype(x.dtype) - observe(denoiser.predict("data", before[0], at, args))
            batch = 0 if self.sample_ndim is None else x.ndim - self.sample_ndim
            square = (gap**2).sum(axis=tuple(range(batch, gap.ndim)))
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0).sum()

        return x - scale_at(self.scale, before[0], x) * jax.grad(misfit)(before[1])


def _pushed(schedule: AbstractSchedule, t: Any, parts: tuple[Array, Array], push: Array) -> tuple[Array, Array]:
    """Data and noise with this added to the score."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return parts[0] + sigma**2 / alpha * push, parts[1] - sigma * push


def _check_operator(operator: Any) -> Any:
    if callable(operator):
        return operator
    if jnp.ndim(operator) != 2:
        raise TypeError(
            "operator must be a matrix that acts on the flattened sample, or a linear function of a sample."
        )
    return jnp.asarray(operator)


def _linear(operator: Any, x: Array, observed: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The operator and its adjoint, between arrays like x and like what was observed.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: for a function that is not linear.
    """
    observe: Any = operator
    if not callable(operator):
        if operator.shape != (observed.size, x.size) or observed.ndim != 1:
            raise ValueError(
                f"the operator has shape {operator.shape}, but the sample has {x.size} components and what was "
                f"observed has shape {observed.shape}."
            )
        matrix = operator.astype(x.dtype)
        observe = lambda v: jnp.matmul(matrix, v.ravel(), precision="highest")
    shape = jax.eval_shape(observe, x).shape
    if shape != observed.shape:
        raise ValueError(f"the operator returns shape {shape}, but what was observed has shape {observed.shape}.")
    transpose = jax.linear_transpose(observe, x)
    try:
        jax.eval_shape(transpose, jax.eval_shape(observe, x))
    except (NotImplementedError, AssertionError) as error:
        raise TypeError(
            "operator must be linear in the sample; for a likelihood of any other kind use sf.diffusion."
            "ClassifierGuided(denoiser, log_likelihood)."
        ) from error
    return observe, lambda w: transpose(w)[0]


def _solved(apply: Callable[[Array], Array], variance: Array, right: Array) -> Array:
    """The solution of symmetric equations and ``variance`` on their diagonal: direct for few, else by iteration."""
    if right.size > _DIRECT:
        whole = lambda w: apply(w) + variance * w
        # Rounding makes precise observations take more iterations than there are unknowns; most others take few.
        return jax.scipy.sparse.linalg.cg(whole, right, tol=1e-5, maxiter=10 * right.size)[0]
    eye = jnp.eye(right.size, dtype=right.dtype)
    matrix = _absolute(jax.lax.map(lambda e: apply(e.reshape(right.shape)).ravel(), eye, batch_size=_BLOCK))
    return jnp.linalg.solve(matrix + variance * eye, right.ravel()).reshape(right.shape)


@jax.custom_jvp
def _absolute(matrix: Array) -> Array:
    """The symmetric matrix with the absolute values of the eigenvalues; one that has no negative ones is returned."""
    return _turned(matrix, *jnp.linalg.eigh(matrix))


def _turned(matrix: Array, values: Array, vectors: Array) -> Array:
    return matrix - 2 * (vectors * jnp.minimum(values, 0)) @ vectors.T


@_absolute.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    values, vectors = jnp.linalg.eigh(matrix)
    # Differences of |v| over differences of v, in a form that equal eigenvalues leave finite.
    size = jnp.abs(values)
    total = size[:, None] + size
    share = jnp.where(total > 0, (values[:, None] + values) / jnp.where(total > 0, total, 1), 0)
    below = vectors @ ((1 - share) * (vectors.T @ change @ vectors)) @ vectors.T
    return _turned(matrix, values, vectors), change - below
