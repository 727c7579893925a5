"""The closed-form control: its bound on the evidence is the evidence, for every path as steps are refined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import z_of_mean

import sdeflow as sf
from sdeflow.equations import FractionalBridge, FractionalState

pytestmark = pytest.mark.usefixtures("x64_module")


def bridge_of(hurst, theta, kind="II", **options):
    noise = sf.paths.MarkovFractionalNoise(hurst, 1.0, kind=kind, rates=np.geomspace(1 / 20, 20, 5), normalise=False)
    return FractionalBridge(noise, theta, 1.0, **{"value": 0.8, "obs_std": 0.5, **options})


def bounds(bridge, n, paths=2000):
    """Of every path: with the martingale taken off less the evidence of its start, and without."""

    @jax.jit
    @jax.vmap
    def one(key):
        equation = bridge.equation()
        start = equation.start(jnp.zeros(1), key=key)
        grid = sf.grids.uniform(0.0, 1.0, n)
        path = bridge.noise.path(grid, (1,), key=jax.random.fold_in(key, 1))
        final = sf.solve(equation, start, [0.0, 1.0], path=path).final
        fit = jax.scipy.stats.norm.logpdf(bridge.value, final.x, bridge.obs_std).sum() - final.path_kl
        truth = bridge.log_evidence(0.0, start)
        return fit - final.martingale - truth, fit - truth

    return [np.asarray(v) for v in one(jax.random.split(jax.random.key(0), paths))]


@pytest.mark.parametrize(
    ("hurst", "theta", "evidence", "spread"),
    [
        (0.3, 1.0, -1.21402, 0.271),
        pytest.param(0.7, 1.0, -1.19634, 0.071, marks=pytest.mark.slow),
        (0.7, 0.0, -1.25661, 0.110),
    ],
)
def test_the_bound_is_the_evidence(hurst, theta, evidence, spread):
    bridge = bridge_of(hurst, theta)
    start = FractionalState(jnp.zeros(1), jnp.zeros((5, 1)))
    assert float(bridge.log_evidence(0.0, start)) == pytest.approx(evidence, abs=1e-5)
    tight, loose = bounds(bridge, 100)
    # The spread of explicit Euler, which exact factors do not exceed, and which falls with the root of the step.
    assert tight.std() < 1.3 * spread
    assert -0.06 < tight.mean() < 3 * tight.std() / np.sqrt(len(tight))
    assert abs(z_of_mean((loose - tight).reshape(8, -1), 0.0)) < 5
    assert loose.std() > 2 * tight.std()
    finer, _ = bounds(bridge, 400)
    assert finer.std() < 0.65 * tight.std()
    assert abs(finer.mean()) < 0.012


def test_with_a_long_past_given_where_it_starts():
    tight, _ = bounds(bridge_of(0.3, 0.0, "I"), 400)
    assert tight.std() < 1.3 * 0.109


def test_paths_have_the_law_of_the_bridge():
    """Against conditioning the covariance of the noise on its end."""
    noise = sf.paths.MarkovFractionalNoise(0.3, 1.0, kind="II")
    bridge = FractionalBridge(noise, 0.0, 1.0, value=0.8, obs_std=0.5)
    solve = lambda key: sf.solve(bridge.equation(), jnp.zeros(1), [0.0, 0.5, 1.0], dt0=1 / 128, key=key).ys[1, 0]
    middle = np.asarray(jax.jit(jax.vmap(solve))(jax.random.split(jax.random.key(1), 4000))).reshape(8, -1)
    end, cross, own = (float(noise.covariance(s, t)) for s, t in ((1, 1), (0.5, 1), (0.5, 0.5)))
    mean, variance = cross * 0.8 / (end + 0.25), own - cross**2 / (end + 0.25)
    # The control is held over a step, which costs a little of the pull.
    assert abs(middle.mean() - mean) < 5 * np.sqrt(variance / 4000) + 0.01
    assert abs(middle.var() / variance - 1) < 5 * np.sqrt(2 / 4000) + 0.01


def test_gradients_of_the_low_variance_bound_vanish_at_the_best_control():
    """Of every path: what is learned from it is nothing but the error of its steps."""
    base = bridge_of(0.7, 1.0)

    def bound(value, key, low):
        equation = bridge_of(0.7, 1.0, value=value).equation()
        path = base.noise.path(sf.grids.uniform(0.0, 1.0, 100), (1,), key=key)
        final = sf.solve(equation, equation.start(jnp.zeros(1)), [0.0, 1.0], path=path).final
        return jax.scipy.stats.norm.logpdf(0.8, final.x, 0.5).sum() - final.path_kl - low * final.martingale

    slopes = jax.jit(jax.vmap(jax.grad(bound), in_axes=(None, 0, None)))
    keys = jax.random.split(jax.random.key(2), 200)
    low, high = (np.asarray(slopes(jnp.asarray(0.8), keys, flag)) for flag in (1.0, 0.0))
    assert low.std() < 0.2 * high.std()
    assert abs(z_of_mean(high.reshape(8, -1), 0.0)) < 5


def test_bad_input():
    varying = sf.paths.MarkovFractionalNoise(lambda t: 0.3 + 0.1 * t, 1.0, kind="II")
    with pytest.raises(ValueError, match="does not depend on time"):
        FractionalBridge(varying, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        bridge_of(0.3, -1.0)
    with pytest.raises(TypeError, match="noise must be"):
        FractionalBridge(0.3, 0.0, 1.0, 0.0)
