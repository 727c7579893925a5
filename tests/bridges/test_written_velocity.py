"""What real bridges write into AnnData: velocities against the closed form of Gaussians, and units there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow.bridges import PiecewiseBridge, gaussian_sb, light_sb, sinkhorn_bridge
from sdeflow.data import Snapshots, simulated_cells, write_velocity
from sdeflow.equations import BrownianMotion

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")

MEANS, VARIANCES, DAYS = np.array([[0.0, 1.0], [2.0, 0.5], [1.0, -1.0]]), (1.0, 0.25, 2.0), (2.0, 3.0, 7.0)
SIGMA = 0.8
BRIDGES = [
    gaussian_sb(
        MEANS[i],
        VARIANCES[i] * jnp.eye(2),
        MEANS[i + 1],
        VARIANCES[i + 1] * jnp.eye(2),
        BrownianMotion(2, SIGMA),
        t0=DAYS[i],
        t1=DAYS[i + 1],
    )
    for i in (0, 1)
]


def exact(i, t, x):
    """The flow of two isotropic Gaussians: m' + v' / (2 v) (x - m)."""
    span = DAYS[i + 1] - DAYS[i]
    s, epsilon, v0, v1 = (t - DAYS[i]) / span, SIGMA**2 * span, VARIANCES[i], VARIANCES[i + 1]
    c = ((4 * v0 * v1 + epsilon**2) ** 0.5 - epsilon) / 2
    v = (1 - s) ** 2 * v0 + s**2 * v1 + s * (1 - s) * (2 * c + epsilon)
    slope = -2 * (1 - s) * v0 + 2 * s * v1 + (1 - 2 * s) * (2 * c + epsilon)
    mean = (1 - s) * MEANS[i] + s * MEANS[i + 1]
    return (MEANS[i + 1] - MEANS[i] + slope / (2 * v) * (x - mean)) / span


def cells(days, dim=2):
    x = np.random.default_rng(0).normal(size=(len(days), dim)).astype(np.float32)
    index = [f"cell{i}" for i in range(len(days))]
    adata = anndata.AnnData(np.zeros((len(days), 3), np.float32), obs=pandas.DataFrame({"day": days}, index=index))
    adata.obsm["X_pca"] = x
    return adata, x


def test_the_velocity_of_a_bridge_is_that_of_the_closed_form():
    days = np.array([2.0, 2.5, 2.9, 3.0])
    adata, x = cells(days)
    write_velocity(adata, BRIDGES[0], time="day")
    wanted = np.stack([exact(0, t, y) for t, y in zip(days, x)])
    np.testing.assert_allclose(adata.obsm["velocity_pca"], wanted, rtol=1e-4, atol=1e-5)
    assert adata.uns["sdeflow"]["epsilon"] == pytest.approx(SIGMA**2)
    assert (adata.uns["sdeflow"]["bridge"], adata.uns["sdeflow"]["t0"]) == ("Bridge", 2.0)


def test_over_many_days_each_cell_has_the_velocity_of_its_own_bridge(tmp_path):
    days = np.array([3.0, 2.0, 7.0, 2.6, 5.0])
    adata, x = cells(days)
    write_velocity(adata, PiecewiseBridge(BRIDGES), time="day")
    wanted = np.stack([exact(int(t >= 3.0), t, y) for t, y in zip(days, x)])
    np.testing.assert_allclose(adata.obsm["velocity_pca"], wanted, rtol=1e-4, atol=1e-5)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(again.obsm["velocity_pca"], adata.obsm["velocity_pca"])
    assert again.uns["sdeflow"]["bridge"] == "PiecewiseBridge"


def test_a_learned_bridge_and_a_bridge_between_samples_write_in_the_units_of_the_file():
    data = simulated_cells(60, key=jax.random.key(0), times=(0.0, 1.0), dim=3)
    adata, _ = cells(np.repeat(data.times, data.counts), 3)
    adata.obsm["X_pca"] = 10 * np.concatenate(data.samples)
    scaled = Snapshots.from_anndata(adata, time="day").standardise("scalar")
    (x0, x1), options = scaled.samples, {"epsilon": 0.1, "num_components": 4, "steps": 50}
    learned = light_sb(x0, x1, **options, backward="fit", key=jax.random.key(1))
    between = sinkhorn_bridge(x0, x1, 0.1)
    for bridge, times, given in ((learned, [0.0, 1.0], {}), (between, [0.1, 0.9], {"times": {0.0: 0.1, 1.0: 0.9}})):
        write_velocity(adata, bridge, time="day", like=scaled, **given)
        value = jax.jit(jax.vmap(bridge.velocity, in_axes=(None, 0)))
        wanted = [np.asarray(value(t, jnp.asarray(x, jnp.float32))) for t, x in zip(times, scaled.samples)]
        found = adata.obsm["velocity_pca"]
        np.testing.assert_allclose(found, np.concatenate(wanted) * scaled.scale, rtol=1e-3, atol=1e-3)
        assert np.isfinite(found).all()
    forward = light_sb(x0, x1, **options, key=jax.random.key(1))
    with pytest.raises(ValueError, match='pass backward="samples" or backward="fit"'):
        write_velocity(adata, forward, time="day", like=scaled)
