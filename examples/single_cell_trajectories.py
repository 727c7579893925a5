"""From cells seen once, on five days, to velocities, fates and a score on a day that no bridge has seen.

The cells are simulated and put where AnnData keeps them; with your own, start from ``adata = anndata.read_h5ad(...)``.
Takes about half a minute; writes demo-output/single_cell_trajectories.png.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sdeflow as sf

made = sf.data.simulated_cells(500, key=jax.random.key(0))
points = np.concatenate(made.samples) - np.concatenate(made.samples).mean(axis=0)
pca = points @ np.linalg.svd(points, full_matrices=False)[2].T
obs = {"day": np.repeat(made.times, made.counts), "type": np.concatenate(made.labels)}
adata = SimpleNamespace(obs=obs, obsm={"X_pca": pca}, uns={}, n_obs=len(pca))
cells = sf.Snapshots.from_anndata(adata, time="day", rep="X_pca", labels="type").standardise("scalar")
wander = sf.equations.BrownianMotion(cells.dim, 0.3)  # What a cell does that nothing guides.


def join(ends, key):
    """The bridge between two days, there and back."""
    (t0, x0), (t1, x1) = ends
    return sf.bridges.light_sb(x0, x1, reference=wander, t0=t0, t1=t1, steps=2000, backward="fit", key=key)


# A day held out: where do the cells of day 1 go if only day 3 is known?
setup = sf.data.leave_one_out(cells)[1]
bridge = join(setup.train.pairs()[1], jax.random.key(1))
start, keys = jnp.asarray(setup.train.at(setup.before), jnp.float32), jax.random.split(jax.random.key(2), 500)
guess = jax.vmap(lambda x, key: bridge.sample_path(x, jnp.array([setup.time]), key=key)[0])(start, keys)
for name, x in {"bridge": guess, f"copy of day {setup.before:g}": start}.items():
    w1, w2 = (sf.metrics.wasserstein(x, setup.cells, p) for p in (1, 2))
    print(f"{name}: W1 {w1:.3f}, W2 {w2:.3f} to day {setup.time:g}, n = {len(x)}")

# All days: one bridge between each two, as one; then velocities, and what becomes of the cells of day 2.
days = sf.bridges.PiecewiseBridge([join(ends, jax.random.key(3)) for ends in cells.pairs()])
sf.data.write_velocity(adata, days, time="day", like=cells)
later = sf.bridges.PiecewiseBridge(days.bridges[2:])  # From day 2 on.
fates = sf.bridges.fate(later, cells.at(2.0), cells.samples[-1], cells.labels[-1], key=jax.random.key(4))
figure = Figure(figsize=(13, 4), layout="constrained")
flow, judged, fated = figure.subplots(1, 3, sharex=True, sharey=True)
flow.scatter(*pca.T[:2], c=obs["day"], s=4)
sf.plotting.streams(adata.obsm["velocity_pca"], pca, ax=flow, least=5.0)
sf.plotting.density(cells.unstandardise(setup.cells), ax=judged, filled=True, label="real")
sf.plotting.density(cells.unstandardise(np.asarray(guess)), ax=judged, color="C3", label="bridge")
judged.legend()
dots = fated.scatter(*cells.unstandardise(cells.at(2.0)).T[:2], c=fates.probabilities[:, 0], s=8)
figure.colorbar(dots, label=f"probability to become {fates.names[0]}")
for ax, title in {flow: "Velocity", judged: f"Day {setup.time:g}, held out", fated: "Fates on day 2"}.items():
    ax.scatter(*pca.T[:2], color="0.9", s=4, zorder=0)
    ax.set(title=title, xlabel="PC 1", ylabel="PC 2")
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/single_cell_trajectories.png", dpi=120)
