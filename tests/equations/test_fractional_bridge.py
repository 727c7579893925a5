"""The closed-form control: its bound on the evidence is the evidence, for every path as steps are refined."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import z_of_mean

import sdeflow as sf
from sdeflow.equations import FractionalBridge, FractionalState
from sdeflow.paths import FactorLaw
from sdeflow.paths._markov_fractional import stationary_factor

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
        truth = bridge.log_evidence(0.0, jnp.zeros(1))
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


def test_with_a_long_past_that_is_seen_through_the_observation():
    """The start too is taken off path by path: what is left is the error of the steps."""
    tight, loose = bounds(bridge_of(0.3, 0.0, "I"), 400)
    assert tight.std() < 1.3 * 0.109
    assert -0.06 < tight.mean() < 3 * tight.std() / np.sqrt(len(tight))
    assert abs(z_of_mean((loose - tight).reshape(8, -1), 0.0)) < 5


#: the evidence of the bridge of Daems et al., and its best bound with a past as in the prior
EVIDENCE = {
    0.1: (-1.49594, -1.54004), 0.3: (-1.28221, -1.28732), 0.5: (-1.22998, -1.23035), 0.7: (-1.25857, -1.26478),
    0.9: (-1.31140, -1.40808),
}  # fmt: skip
#: how far independent coordinates of the past stay below the evidence
INDEPENDENT = {0.1: 0.03280, 0.3: 0.00346, 0.5: 0.00015, 0.7: 0.00066, 0.9: 0.01327}


def best_bound(bridge, law):
    """The best bound with factors that start in a law, from the definition: E log p(y | factors) - KL."""
    zero, L = jnp.zeros(1), stationary_factor(bridge.noise._rates)
    at = lambda z: bridge.log_evidence(0.0, FractionalState(zero, L @ z))
    # Quadratic in the coordinates, so that its mean is exact.
    curvature, S = jax.hessian(lambda z: at(z[:, None]))(jnp.zeros(len(L))), law._matrices()[..., 0]
    return float(at(law.mean) + jnp.trace(S.T @ curvature @ S) / 2 - law.kl())


@pytest.mark.parametrize("hurst", EVIDENCE)
def test_the_law_of_the_past(hurst):
    noise = sf.paths.MarkovFractionalNoise(hurst, 6.0, rates=np.geomspace(1 / 20, 20, 5), normalise=False)
    bridge = FractionalBridge(noise, 0.0, 2.0, value=0.0, obs_std=0.1)
    evidence, prior = EVIDENCE[hurst]
    assert float(bridge.log_evidence(0.0, jnp.zeros(1))) == pytest.approx(evidence, abs=1e-5)
    zeros = jnp.zeros((5, 1))
    assert best_bound(bridge, FactorLaw(zeros, zeros)) == pytest.approx(prior, abs=1e-5)
    assert best_bound(bridge, bridge.past(0.0, jnp.zeros(1))) == pytest.approx(evidence, abs=1e-5)
    # Bayes' rule at any value, mean included.
    moved = FractionalBridge(noise, 0.5, 2.0, value=1.3, obs_std=0.1)
    law = moved.past(0.0, jnp.ones(1))
    z = jnp.linspace(-1.0, 0.8, 5)[:, None]
    given = moved.log_evidence(0.0, FractionalState(jnp.ones(1), stationary_factor(noise._rates) @ z))
    assert float(given - law.log_ratio(z)) == pytest.approx(float(moved.log_evidence(0.0, jnp.ones(1))), abs=1e-9)
    law = bridge.past(0.0, jnp.zeros(1))
    # The best independent coordinates have the joint law's mean and the diagonal of its precision.
    S = law._matrices()[..., 0]
    alone = -jnp.log(jnp.diag(jnp.linalg.inv(S @ S.T)))[:, None] / 2
    gap = evidence - best_bound(bridge, FactorLaw(law.mean, alone))
    assert gap == pytest.approx(INDEPENDENT[hurst], abs=2e-5)


def test_what_is_learned_of_the_past_is_nothing_at_its_law():
    """For every draw, with the martingale taken off; without, only on average."""
    bridge = bridge_of(0.3, 0.0, "I")
    x = jnp.zeros(1)

    def bound(law, key, low):
        equation = bridge.equation()
        state = eqx.tree_at(lambda e: e.past, equation, law).start(x, key=key)
        return bridge.log_evidence(0.0, state) - state.path_kl - low * state.martingale

    slopes = jax.jit(jax.vmap(jax.grad(bound), in_axes=(None, 0, None)))
    keys = jax.random.split(jax.random.key(3), 4000)
    low, high = (slopes(bridge.past(0.0, x), keys, flag) for flag in (1.0, 0.0))
    for exact, loose in zip(jax.tree.leaves(low), jax.tree.leaves(high)):
        np.testing.assert_allclose(exact, 0, atol=1e-10)
        rough = np.asarray(loose).reshape(8, 500, -1)
        used = rough.std(axis=(0, 1)) > 0
        assert used.any()
        assert (np.abs(rough.mean(axis=(0, 1))) < 5 * rough.std(axis=(0, 1)) / np.sqrt(4000) + 1e-12).all()


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


@pytest.mark.parametrize("t", [1.0, 1.1])
def test_after_the_observation_there_is_no_control(t):
    bridge = bridge_of(0.7, 0.0)
    state = FractionalState(jnp.array([0.3]), jnp.ones((5, 1)))
    assert bridge(0.9, state) != 0
    assert bridge(t, state) == 0
