"""From data back to noise: exactly, where steps can be undone, else up to the error of the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    BDIA,
    DDIM,
    VP,
    DPMSolver,
    DPMSolverPP,
    MeanReverting,
    Multistep,
    Singlestep,
    UniPC,
    invert,
    sample,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")


def round_trip(gamma, steps, dtype=jnp.float64, **options):
    x, solver = jnp.asarray(gmm.starts(64), dtype), BDIA(gamma)
    pair = sample(gmm.denoiser(), x, solver=solver, num_steps=steps, return_state=True, **options)
    back = invert(gmm.denoiser(), pair, solver=solver, num_steps=steps, **options)
    return float(jnp.abs(back - x).max())


def test_bdia_comes_back():
    assert round_trip(1.0, 40) < 1e-13
    assert round_trip(0.95, 40) < 1e-12
    assert round_trip(1.0, 40, grid="t") < 1e-13


def test_a_small_gamma_is_a_warning():
    with pytest.warns(sf._compat.SdeflowWarning, match="gamma=0.5"):
        lost = round_trip(0.5, 40)
    # Rounding grows as the warning says: some 1e-3 in double precision.
    assert 1e-6 < lost < 1
    with pytest.warns(sf._compat.SdeflowWarning, match="gamma=0.8"):
        invert(gmm.denoiser(), jnp.asarray(gmm.starts(2), jnp.float32), solver=BDIA(0.8), num_steps=40)


def test_bdia_comes_back_from_data():
    # A single state has no neighbour: the first step is one of DDIM. From there on everything is undone.
    x = jnp.asarray(gmm.reference(64))
    pair = invert(gmm.denoiser(), x, solver=BDIA(), num_steps=40, return_state=True)
    again, _ = sample(gmm.denoiser(), pair, solver=BDIA(), num_steps=40, return_state=True)
    np.testing.assert_allclose(again, x, atol=1e-12)
    alone = invert(gmm.denoiser(), x, solver=BDIA(), num_steps=40)
    np.testing.assert_array_equal(alone, pair[0])


def test_ddim_is_undone_by_fixed_points():
    x = jnp.asarray(gmm.starts(16))
    end = sample(gmm.denoiser(), x, solver=DDIM(), num_steps=60)
    back = invert(gmm.denoiser(), end, solver=DDIM(), num_steps=60, fixed_point=60)
    np.testing.assert_allclose(back, x, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "order"),
    [(DPMSolverPP(2), 2), (UniPC(2), 2), (Singlestep(3), 3), (Multistep(1, "noise"), 1)],
    ids=["DPM++", "UniPC", "3S", "DDIM"],
)
def test_reversed_times_invert_up_to_the_error_of_the_steps(solver, order):
    end, x = jnp.asarray(gmm.reference(32)), gmm.starts(32)
    errors = [gmm.median(invert(gmm.denoiser(), end, solver=solver, num_steps=n), x) for n in (80, 160)]
    assert np.log2(errors[0] / errors[1]) > order - 0.35


def test_around_a_mean():
    mean = np.array([2.0, -1.0])
    schedule = MeanReverting(VP(), mean)
    noise = lambda t, x, args: gmm.noise_of(x - jnp.asarray(mean), schedule.alpha(t), schedule.sigma(t))
    denoiser, x = sf.diffusion.Denoiser(noise, schedule), jnp.asarray(mean + gmm.starts(8))
    pair = sample(denoiser, x, solver=BDIA(), num_steps=20, return_state=True)
    np.testing.assert_allclose(invert(denoiser, pair, solver=BDIA(), num_steps=20), x, atol=1e-12)


def test_inversion_has_gradients():
    x, h = jnp.asarray(gmm.reference(1)[0]), 1e-5
    # The steps are short enough for the iterations to converge: without t_end they diverge.
    for options in ({"solver": BDIA()}, {"solver": DDIM(), "fixed_point": 12, "grid": "t", "t_end": 0.4}):
        f = jax.jit(lambda x, o=options: invert(gmm.denoiser(), x, num_steps=6, **o).sum())
        wanted = (f(x + h) - f(x - h)) / (2 * h)
        assert float(jax.grad(f)(x).sum()) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: invert(gmm.denoiser(), x, solver=DDIM(1.0), num_steps=4), "noise"),
        (lambda x: invert(gmm.denoiser(), x, solver=DDIM(), num_steps=4, t_end=0.0), "no noise"),
        (lambda x: invert(gmm.denoiser(), x, solver=UniPC(2), num_steps=4, fixed_point=3), "order 1"),
        (lambda x: invert(gmm.denoiser(), x, solver=DDIM(), num_steps=4, fixed_point=-1), "fixed_point"),
        (lambda x: invert(gmm.denoiser(), x, solver=DDIM(), num_steps=4, fixed_point=True), "number of iterations"),
        (lambda x: invert(gmm.denoiser(), x, solver=DPMSolver(3, steps="fast"), num_steps=4), "fast"),
        (lambda x: invert(gmm.denoiser(), (x, x), solver=DDIM(), num_steps=4), "pair"),
        (lambda x: invert(gmm.denoiser(), (x, x[:1]), solver=BDIA(), num_steps=4), "alike"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.asarray(gmm.starts(3)))
