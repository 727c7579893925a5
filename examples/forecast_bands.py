"""Forecast noisy series with bands, and see what the loss makes of the noise.

Mean-reverting series are read up to three quarters of their time; a neural Langevin equation says what comes next.
Fitted by the mean square error its samples hardly differ; fitted by the energy score they differ as the data do. Takes
about a minute; writes demo-output/forecast_bands.png.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

ou = sf.equations.OrnsteinUhlenbeck(theta=1.0, mean=0.0, sigma=0.7)
grid = np.linspace(0.0, 4.0, 41)
keys = jax.random.split(jax.random.key(0), 544)
start = lambda key: 2.0 * jax.random.normal(jax.random.fold_in(key, 1), (1,))
paths = np.asarray(jax.vmap(lambda key: sf.solve(ou, start(key), grid, dt0=0.05, key=key).ys)(keys))
data = sf.TimeSeries.from_arrays([grid] * 512, list(paths[:512])).standardise()
test = sf.TimeSeries.from_arrays([grid] * 32, list(paths[512:]), like=data).standardise(like=data)
later = grid[grid > 3.0]


def forecasts(loss):
    """Samples in the user's units, (series, samples, times)."""
    dynamics = sf.models.NeuralLangevinSDE(16, control_size=1, width=32, key=jax.random.key(1))
    model = sf.models.SeriesModel(dynamics, channels=1, task="forecast", num_samples=8, key=jax.random.key(2))
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 400)))
    fit = sf.fit(model, data, loss, optim=optim, steps=400, batch_size=64, key=jax.random.key(3))
    samples = fit.model.forecast(test.until(3.0), later, 200, key=jax.random.key(4))
    return test.to_user_values(samples)[..., 0]


found = {"mean square error": forecasts(sf.losses.MaskedMSE()), "energy score": forecasts(sf.losses.EnergyScore())}
truth = paths[512:, grid > 3.0, 0]
figure = Figure(figsize=(10, 4), layout="constrained")
for ax, (name, samples) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
    draws = np.moveaxis(samples, 1, 0)
    score, inside = sf.metrics.crps(draws, truth, average=True), sf.metrics.coverage(draws, truth, 0.9)
    print(f"{name}: CRPS {score:.3f}, {inside:.0%} of the truth inside 90 % bands")
    sf.plotting.bands(later, samples[0], ax=ax)
    ax.plot(grid, paths[512, :, 0], color="black", linewidth=0.8)
    ax.set(title=f"{name}: CRPS {score:.3f}", xlabel="time")
Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/forecast_bands.png", dpi=120)
