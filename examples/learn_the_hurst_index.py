"""Learn how rough noise is from a few series at irregular times, with standard errors.

Four series of fractional Brownian motion are seen through noise. Its Hurst index, its scale and the noise are learned
by gradients of the exact likelihood; so they are, with the strength of a spring, where one holds the series back. Takes
half a minute; writes demo-output/learn_the_hurst_index.png.
"""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

NAMES, TRUTH = ("H", "scale", "noise", "spring"), np.array([0.7, 2.0, 0.1, 3.0])
read = lambda p: jnp.append(jax.nn.sigmoid(p[:1]), jnp.exp(p[1:]))  # what is learned has no bounds
rng, fine, optim = np.random.default_rng(0), np.linspace(0.0, 1.0, 1025), optax.adam(0.1)
rows = np.sort([rng.choice(np.arange(1, 1025), 80, replace=False) for _ in range(4)])
times, blur = fine[rows], TRUTH[2] * rng.normal(size=rows.shape)
path = sf.paths.FractionalBrownian(fine, (4,), key=jax.random.key(0), hurst=TRUTH[0])
sde = sf.SDE(lambda t, x, k: -k * x, lambda t, x, k: jnp.full_like(x, TRUTH[1]), additive=True)
paths = lambda k: sf.solve(sde, jnp.zeros(4), fine, args=k, dt0=1 / 1024, path=path, solver=diffrax.Heun()).ys


@jax.jit
def likelihood(p, xs):
    """The log density of dX = -k X dt + scale dB: X and the factors of B are one linear equation, of known law."""
    H, scale, noise, *k = read(p)
    unit = sf.paths.MarkovFractionalNoise(H, 1.0, spacing=1 / 256)
    if not k:
        one = lambda ts, xs: unit.log_prob(ts, xs / scale, obs_std=noise / scale) - len(ts) * jnp.log(scale)
        return jax.vmap(one)(times, xs).sum()
    w, r = scale * unit.coefficients(), unit.rates
    A = jnp.diag(-jnp.append(k[0], r)).at[0, 1:].set(-w * r)
    C = np.pad(1 / (r[1:] + r[1:, None]), (2, 0))  # the long past of the factors; X and that of rate 0 start at 0
    whole = sf.equations.LinearSDE(A, jnp.zeros(7), jnp.append(w.sum(), jnp.ones(6))[:, None])
    how = {"obs_std": noise, "observe": [0], "initial": (np.zeros(7), C), "t0": 0.0}
    return jax.vmap(lambda ts, xs: whole.log_prob(ts, xs, **how))(times, xs).sum()


@jax.jit
def climb(p, xs, free):
    """The parameters after 60 steps of Adam in those that are free; a handful is differentiated fastest forwards."""

    def update(_, carry):
        updates, state = optim.update(-free * jax.jacfwd(likelihood)(carry[0], xs), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 60, update, (p, optim.init(p)))[0]


figure, grid = Figure(figsize=(10, 4), layout="constrained"), np.linspace(0.5, 0.9, 9)
left, right = figure.subplots(1, 2)
start, curvature = jnp.array([0.0, 0.0, -2.0]), jax.jit(jax.jacfwd(jax.jacfwd(likelihood)))
for name, k in (("no spring", 0.0), ("a spring", TRUTH[3])):
    xs = np.take_along_axis(np.asarray(paths(k)).T, rows, 1) + blur
    best = climb(start, xs, jnp.ones(start.size))
    slope = jax.jacobian(read)(best)
    errors = jnp.sqrt(jnp.diag(slope @ jnp.linalg.inv(-curvature(best, xs)) @ slope.T))
    found = zip(NAMES, read(best), errors, TRUTH, strict=False)
    print(f"{name}:", ", ".join(f"{n} {x:.3f} +- {e:.3f} ({t})" for n, x, e, t in found))
    left.plot(times[0], xs[0], ".", label=name)
    if not k:  # how likely each H is, with the rest learned anew
        others = jnp.ones(start.size).at[0].set(0)
        held = [climb(best.at[0].set(np.log(H / (1 - H))), xs, others) for H in grid]
        right.plot(grid, [likelihood(p, xs) - likelihood(best, xs) for p in held], ".-")
    start = jnp.append(best, 0.0)
left.set(xlabel="time", title="one of four series")
right.set(xlabel="H", title="log likelihood without the spring, all else learned", ylim=(-6, 0.5))
right.axvline(TRUTH[0], color="black", linewidth=0.8)
left.legend()
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/learn_the_hurst_index.png", dpi=120)
