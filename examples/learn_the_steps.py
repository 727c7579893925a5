"""Train a diffusion model on points in the plane, and learn when its sampler should step.

A few evaluations of a network leave an error; gradients through the sampler, in the times of its steps, say where they
are better spent. Takes about half a minute; writes demo-output/learn_the_steps.png.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

rng, evaluations = np.random.default_rng(0), 6
turn = 3 * np.pi * np.sqrt(rng.uniform(size=4096))
spiral = turn[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1) / 9 + 0.03 * rng.normal(size=(4096, 2))
waves = jnp.array([1.0, 2.0, 4.0, 8.0])


class Network(eqx.Module):
    """A network that sees the level of the noise as waves."""

    mlp: eqx.nn.MLP

    def __call__(self, label, y, args):
        """What is to be added to one point, both of unit variance."""
        return self.mlp(jnp.concatenate([y, jnp.sin(label * waves), jnp.cos(label * waves)]))


schedule, network = sf.diffusion.EDM(0.01, 20.0), Network(eqx.nn.MLP(10, 2, 128, 3, jax.nn.silu, key=jax.random.key(0)))
model = sf.diffusion.Precondition(network, schedule, sigma_data=0.5)
optim = optax.adam(optax.cosine_decay_schedule(3e-3, 4000))
data, loss = sf.data.Samples(spiral.astype(np.float32)), sf.diffusion.EDMLoss()
model = sf.fit(model, data, loss, optim=optim, steps=4000, batch_size=256, key=jax.random.key(1)).model

even = sf.diffusion.sampling_grid(schedule, evaluations)
noise, other = schedule.sample_prior((2, 512, 2), key=jax.random.key(2))
solver = sf.diffusion.UniPC(2, lower_order_final=True)
draw = lambda x, **grid: jax.vmap(lambda x: sf.diffusion.sample(model, x, solver=solver, **grid))(x)
times = lambda gaps: jnp.exp(jnp.log(20.0) - np.log(2000.0) * jnp.cumsum(jax.nn.softmax(gaps)))


def steps(gaps):
    """The grid whose steps take these shares of log(alpha / sigma)."""
    right = times(gaps)
    return sf.grids.Grid(jnp.append(20.0, right[:-1]), right, even.live, even.save)


exact = jax.jit(lambda x: draw(x, num_steps=200))
error = jax.jit(lambda gaps, x, ends: jnp.mean(jnp.sqrt(jnp.sum((draw(x, grid=steps(gaps)) - ends) ** 2, axis=-1))))
gaps, ends, adam = jnp.zeros(evaluations), exact(noise), optax.adam(0.05)
state, slope = adam.init(gaps), jax.jit(jax.grad(error))
for _ in range(150):
    updates, state = adam.update(slope(gaps, noise, ends), state)
    gaps = optax.apply_updates(gaps, updates)
print("sigma after each step:", times(gaps).round(3))
figure = Figure(figsize=(9, 4.5), layout="constrained")
for ax, (name, found) in zip(figure.subplots(1, 2), {"even": jnp.zeros(evaluations), "learned": gaps}.items()):
    ax.scatter(*spiral.T, color="0.85", s=4)
    ax.scatter(*draw(other, grid=steps(found)).T, s=6)
    print(f"{name} steps, other noise: mean error {(wrong := error(found, other, exact(other))):.4f}")
    ax.set(title=f"{evaluations} {name} steps: mean error {wrong:.4f}", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/learn_the_steps.png", dpi=120)
