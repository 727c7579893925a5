"""Learn to end at an observation, for a mean-reverting process whose noise has memory: rough, or smooth.

A network pushes the noise; what that costs and how well paths end bound the log density of the observation. Here that
density is known, and so is the law of paths. Takes about a minute; writes demo-output/fractional_bridge.png.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

value, deviation, ts = 0.8, 0.3, 1 - np.linspace(1.0, 0.0, 51) ** 2  # steps that shrink towards the observation
starts, fine = sf.data.Samples(np.zeros((4096, 1), np.float32)), np.arange(1, 201) / 200


class Push(eqx.Module):
    """What is added to the noise: a pull towards the observation, as strong as a network says, and a rest."""

    mlp: eqx.nn.MLP

    def __call__(self, t, state, args):
        """The network sees the time, the state and the memory."""
        out = self.mlp(jnp.concatenate([jnp.stack([t, 1 - t]), state.x, state.factors[:, 0]]))
        return out[:1] + out[1] * (value - state.x) / (1 - t + deviation**2)


@eqx.filter_jit
def bound(push, noise, x, key):
    """The bound of every path, the martingale taken off, and the paths."""
    sde = sf.equations.FractionalSDE(lambda t, x, args: -x, lambda t, x, args: jnp.ones(1), noise, control=push)
    sol = jax.vmap(lambda x, key: sf.solve(sde, x, ts, steps_per_interval=1, key=key))(x, jax.random.split(key, len(x)))
    fit = jax.scipy.stats.norm.logpdf(value, sol.ys[:, -1, 0], deviation)
    return fit - sol.final.path_kl - sol.final.martingale, sol.ys[..., 0]


figure, optim = Figure(figsize=(10, 4), layout="constrained"), optax.adam(optax.cosine_decay_schedule(5e-3, 1500))
for ax, hurst in zip(figure.subplots(1, 2, sharey=True), (0.3, 0.7), strict=True):
    noise = sf.paths.MarkovFractionalNoise(hurst, horizon=1.0, kind="II")
    loss = lambda push, batch, key, step, noise=noise: (-bound(push, noise, batch.values, key)[0].mean(), {})
    start = Push(eqx.nn.MLP(9, 2, 64, 2, jnp.tanh, key=jax.random.key(0)))
    push = sf.fit(start, starts, loss, optim=optim, steps=1500, batch_size=64, key=jax.random.key(1)).model
    nats, paths = bound(push, noise, starts.values, jax.random.key(2))
    A = 1.0025 * np.eye(200) - np.tril(np.exp(fine - fine[:, None])) / 200  # X(t) = B(t) - int exp(s - t) B(s) ds
    C = A @ noise.covariance(fine[:, None], fine) @ A.T
    mean, spread = (gain := C[-1] / (C[-1, -1] + deviation**2)) * value, np.sqrt(np.diag(C) - gain * C[-1])
    log_p = sf.equations.FractionalBridge(noise, 1.0, 1.0, value, deviation).log_evidence(0.0, jnp.zeros(1))
    print(title := f"H = {hurst}: bound {nats.mean():.3f}, log density {log_p:.3f} nats")
    ax.fill_between(fine, mean - 2 * spread, mean + 2 * spread, color="0.88")
    ax.plot(ts, paths[:8].T, color="C0", linewidth=0.6)
    ax.plot(ts, (paths.mean(axis=0) + np.array([[-2], [0], [2]]) * paths.std(axis=0)).T, "C1--")
    ax.set(title=title, xlabel="time")
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/fractional_bridge.png", dpi=120)
