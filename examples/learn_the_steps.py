"""Train a diffusion model on points in the plane, and learn when its sampler should step.

Six evaluations of a network leave an error; gradients through the sampler, in the times of its steps, say where they
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


class Network(eqx.Module):
    """What is to be added to a point; it sees the level of the noise as waves."""

    mlp: eqx.nn.MLP

    def __call__(self, label, y, args):
        """The output at one point."""
        waves = label * jnp.array([1.0, 2.0, 4.0, 8.0])
        return self.mlp(jnp.concatenate([y, jnp.sin(waves), jnp.cos(waves)]))


rng, evaluations, solver = np.random.default_rng(0), 6, sf.diffusion.UniPC(2, lower_order_final=True)
turn = 3 * np.pi * np.sqrt(rng.uniform(size=4096))
spiral = turn[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1) / 9 + 0.03 * rng.normal(size=(4096, 2))
data, schedule = sf.data.Samples(spiral.astype(np.float32)), sf.diffusion.EDM(0.01, 20.0)
network = Network(eqx.nn.MLP(10, 2, 128, 3, jax.nn.silu, key=jax.random.key(0)))
model, loss = sf.diffusion.Precondition(network, schedule, sigma_data=0.5), sf.diffusion.EDMLoss()
optim = optax.adam(optax.cosine_decay_schedule(3e-3, 4000))
model = sf.fit(model, data, loss, optim=optim, steps=4000, batch_size=256, key=jax.random.key(1)).model

even = sf.diffusion.sampling_grid(schedule, evaluations)  # equal steps in log(alpha / sigma)
times = lambda gaps: 20.0 * jnp.exp(-np.log(2000.0) * jnp.cumsum(jax.nn.softmax(gaps)))
grid = lambda gaps: sf.grids.Grid(jnp.append(20.0, times(gaps)[:-1]), times(gaps), even.live, even.save)
draw = jax.jit(jax.vmap(lambda x, gaps: sf.diffusion.sample(model, x, solver=solver, grid=grid(gaps)), (0, None)))
exact = jax.jit(jax.vmap(lambda x: sf.diffusion.sample(model, x, solver=solver, num_steps=200)))
error = lambda gaps, x, ends: jnp.mean(jnp.linalg.norm(draw(x, gaps) - ends, axis=1))
noise, other = schedule.sample_prior((2, 512, 2), key=jax.random.key(2))
gaps, ends, slope, adam = jnp.zeros(evaluations), exact(noise), jax.jit(jax.grad(error)), optax.adam(0.05)
state = adam.init(gaps)
for _ in range(150):
    updates, state = adam.update(slope(gaps, noise, ends), state)
    gaps = optax.apply_updates(gaps, updates)
figure = Figure(figsize=(9, 4.5), layout="constrained")
for ax, (name, found) in zip(figure.subplots(1, 2), {"even": jnp.zeros(evaluations), "learned": gaps}.items()):
    wrong = error(found, other, exact(other))
    print(f"{name} steps: mean error {wrong:.4f} from other noise; sigma after each:", np.round(times(found), 3))
    ax.scatter(*spiral.T, color="0.85", s=4)
    ax.scatter(*draw(other, found).T, s=6)
    ax.set(title=f"{evaluations} {name} steps: mean error {wrong:.4f}", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/learn_the_steps.png", dpi=120)
