"""A mixture of Gaussians under a diffusion: exact scores, exact noise predictions, and reference solutions.

Five components in the plane, in two classes; the score of class 1 and of all give exact guidance. The table of digits
that samplers reach on it is in ``benchmarks/diffusion.py``.
"""

import functools

import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import sdeflow as sf

WEIGHTS = np.array([0.10, 0.20, 0.30, 0.25, 0.15])
MEANS = np.array([[-1.5, -1.0], [1.4, -0.8], [0.0, 1.6], [-1.1, 1.2], [0.6, 0.2]])
DEVIATIONS = np.array([[0.15, 0.30], [0.25, 0.12], [0.20, 0.20], [0.10, 0.35], [0.30, 0.15]])
ANGLES = np.array([0.3, -0.6, 0.0, 1.0, 0.5])
CLASSES = np.array([0, 0, 1, 1, 0])
_TURNS = np.array([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in ANGLES])
SCHEDULE = sf.diffusion.VP()


def noise_of(x, alpha, sigma, rows=slice(None), xp=jnp):
    """The best prediction of the noise in x (..., 2), with the components in ``rows`` alone."""
    weights, means, deviations, turns = (xp.asarray(a[rows], x.dtype) for a in (WEIGHTS, MEANS, DEVIATIONS, _TURNS))
    # In the axes of each component its covariance is diagonal.
    turned = xp.einsum("kji,...kj->...ki", turns, x[..., None, :] - alpha * means)
    variance = alpha**2 * deviations**2 + sigma**2
    logits = xp.log(weights) - xp.log(variance).sum(-1) / 2 - (turned**2 / variance).sum(-1) / 2
    logits = logits - logits.max(-1, keepdims=True)
    w = xp.exp(logits)
    w = w / w.sum(-1, keepdims=True)
    return sigma * xp.einsum("...k,kij,...kj->...i", w, turns, turned / variance)


def denoiser(schedule=SCHEDULE, scale=None):
    """The exact denoiser; with a ``scale`` guided towards class 1."""
    one = lambda rows: sf.diffusion.Denoiser(
        lambda t, x, args: noise_of(x, schedule.alpha(t), schedule.sigma(t), rows), schedule
    )
    if scale is None:
        return one(slice(None))
    return sf.diffusion.Guided(one(CLASSES == 1), one(slice(None)), scale)


def starts(count=512, seed=0):
    """Noise to start from."""
    return np.random.default_rng(seed).standard_normal((count, 2))


@functools.cache
def reference(count=512, seed=0, scale=None, t_end=1e-3):
    """The ordinary equation solved to 1e-12, by DOP853 in log(alpha / sigma) for x / sigma."""
    schedule, x = SCHEDULE, starts(count, seed)

    def velocity(l, y):
        y, t = y.reshape(count, 2), schedule.t_of_log_snr(np.float64(l))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        noise = noise_of(sigma * y, alpha, sigma, xp=np)
        if scale is not None:
            noise = noise + scale * (noise_of(sigma * y, alpha, sigma, CLASSES == 1, xp=np) - noise)
        return (y - noise).ravel()

    span = [float(schedule.log_snr(np.float64(t))) for t in (1.0, t_end)]
    start = (x / schedule.sigma(np.float64(1.0))).ravel()
    out = solve_ivp(velocity, span, start, method="DOP853", rtol=1e-12, atol=1e-12)
    return out.y[:, -1].reshape(count, 2) * schedule.sigma(np.float64(t_end))


def rms(x, y):
    """The root mean square of all differences."""
    return float(np.sqrt(((np.asarray(x) - y) ** 2).mean()))


def median(x, y):
    """The median over samples of the largest difference of a sample."""
    return float(np.median(np.abs(np.asarray(x) - y).max(axis=1)))


@functools.cache
def _batched(scale):
    return denoiser(scale=scale)


def error(solver, num_steps, grid="logsnr", scale=None, count=512, seed=0, measure=rms):
    """How far a sampler ends from the reference."""
    out = sf.diffusion.sample(
        _batched(scale), jnp.asarray(starts(count, seed)), solver=solver, num_steps=num_steps, grid=grid
    )
    return measure(out, reference(count, seed, scale))
