"""Fit a spiral twice, the second time charged for the error of one step of each solve.

Both fits start alike and see the same data; the charged one needs fewer evaluations of its field at the same tolerance.
Takes some seconds; writes demo-output/cheap_to_solve.png.
"""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

STEPS, TIMES = 500, np.linspace(0.0, 0.5, 6)
spiral = sf.ODE(lambda t, y, args: y**3 @ jnp.array([[-0.1, -2.0], [2.0, -0.1]]))
network = sf.ODE(lambda t, y, p: jnp.tanh(y**3 @ p["in"] + p["shift"]) @ p["out"])
tight = {"solver": diffrax.Tsit5(), "stepsize_controller": diffrax.PIDController(rtol=1e-6, atol=1e-6), "throw": False}

starts = jnp.array([2.0, 0.0]) + 0.1 * jax.random.normal(jax.random.key(0), (16, 2))
data = sf.solve(spiral, starts, TIMES, **tight).ys
data += 0.05 * jax.random.normal(jax.random.key(1), data.shape)
first, last = jax.random.split(jax.random.key(2))
wide, narrow = jax.random.normal(first, (2, 50)) / 2**0.5, jax.random.normal(last, (50, 2)) / 50**0.5
params = {"in": wide, "shift": jnp.zeros(50), "out": narrow}
optim = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))


def fit(charges, weight):
    """Train; return the loss and the evaluations of the field at every update."""

    def loss(params, i):
        key = jax.random.fold_in(jax.random.key(3), i) if charges else None
        sol = sf.solve(network, starts, TIMES, args=params, regularisers=charges, key=key, **tight)
        error = jnp.mean((sol.ys - data) ** 2)
        return error + weight(i) * sum(sol.penalties.values()), (error, sol.stats["nfe"])

    def update(carry, i):
        grads, seen = jax.grad(loss, has_aux=True)(carry[0], i)
        updates, state = optim.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), seen

    return jax.jit(lambda p: jax.lax.scan(update, (p, optim.init(p)), jnp.arange(STEPS))[1])(params)


charged = fit((sf.regularisers.LocalError(time="biased"),), optax.exponential_decay(1.0, STEPS, 0.1))
fits = {"not charged": fit((), lambda i: 0.0), "charged for LocalError": charged}
figure = Figure(figsize=(9, 4), layout="constrained")
for ax, (name, (error, nfe)) in zip(figure.subplots(1, 2, sharex=True, sharey=True), fits.items(), strict=True):
    print(f"{name}: loss {error[-1]:.4f}, {nfe[-1]} evaluations")
    dots = ax.scatter(nfe, error, c=np.arange(STEPS), s=8)
    ax.set(title=name, xlabel="evaluations of the field in a solve", ylabel="loss", yscale="log")
figure.colorbar(dots, label="update")
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/cheap_to_solve.png", dpi=120)
