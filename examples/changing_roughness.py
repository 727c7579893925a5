"""Learn how the roughness of noise changes in time, from one path and its exact likelihood.

The Hurst index rises from 0.3 to 0.8 while the noise is watched. A small network of time is fitted to each of twelve
paths, which are drawn with more and faster factors than it is fitted with. Takes half a minute; writes
demo-output/changing_roughness.png.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf


class Roughness(eqx.Module):
    """H(t), between 0.02 and 0.98."""

    net: eqx.nn.MLP

    def __call__(self, t):
        """H at one time."""
        return 0.02 + 0.96 * jax.nn.sigmoid(self.net(2.0 * t[None] - 1.0)[0])


truth, ts, optim = lambda t: 0.3 + 0.5 * t, jnp.arange(1, 401) / 400, optax.adam(0.05)
drawn = sf.paths.MarkovFractionalNoise(truth, 1.0, kind="II", spacing=1 / 1600, num_factors=8)
keys = jax.random.split(jax.random.key(0), 12)
paths = jax.vmap(lambda key: drawn.sample(ts, key=key))(keys)


@jax.jit
@jax.vmap
def fit(path, key):
    """H at all times, learned from one path."""
    network = eqx.nn.MLP(1, 1, 10, 1, jnp.tanh, key=key)
    params, rest = eqx.partition(Roughness(network), eqx.is_inexact_array)
    noise = lambda params: sf.paths.MarkovFractionalNoise(eqx.combine(params, rest), 1.0, kind="II", spacing=1 / 400)

    def update(_, carry):
        slope = jax.grad(lambda params: -noise(params).log_prob(ts, path))(carry[0])
        updates, state = optim.update(slope, carry[1])
        return optax.apply_updates(carry[0], updates), state

    params, _ = jax.lax.fori_loop(0, 150, update, (params, optim.init(params)))
    return jax.vmap(eqx.combine(params, rest))(ts)


low, middle, high = np.quantile(fit(paths, keys), (0.1, 0.5, 0.9), axis=0)
for i in (39, 199, 359):
    print(f"H({ts[i]:.1f}) = {truth(ts[i]):.2f}; learned: median {middle[i]:.3f}, most {low[i]:.3f} to {high[i]:.3f}")
left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
left.plot(ts, paths[0], linewidth=0.8)
left.set(xlabel="time", title="one of twelve paths")
right.fill_between(ts, low, high, alpha=0.3, label="learned from four paths in five")
right.plot(ts, middle, label="their median")
right.plot(ts, truth(ts), "--", color="black", label="truth")
right.set(xlabel="time", ylabel="Hurst index", ylim=(0.2, 0.9))
right.legend()
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/changing_roughness.png", dpi=120)
