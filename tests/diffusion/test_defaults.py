"""What `sample` chooses by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from benchmarks.sampler_defaults import Mixture, ranking

d = sf.diffusion


@pytest.mark.parametrize("schedule", [d.VP(), d.EDM(), d.Flow(), d.Cosine()], ids=["VP", "EDM", "Flow", "Cosine"])
@pytest.mark.parametrize("count", [5, 10])
def test_the_defaults_are_among_the_best_tenth(schedule, count):
    problems = [Mixture(schedule, (2, 4, 8, 16)[seed % 4], seed, starts=16) for seed in range(200, 208)]
    names = [name for _, name in ranking(problems, count, d.default_sampler)]
    assert names.index("chosen") < len(names) // 10


@pytest.mark.parametrize(
    "schedule",
    [d.VP(), d.EDM(), d.VE(), d.Flow(), d.Flow(t_max=1.0), d.SubVP(), d.Tabulated(np.linspace(1e-4, 0.02, 100))],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("t_end", [None, 0.0])
def test_sample_takes_what_default_sampler_names(schedule, count, t_end):
    model = d.Denoiser(lambda t, x, args: 0 * x + 3.0, schedule, prediction="data")
    x = schedule.sample_prior((2,), key=jax.random.key(0))
    solver, grid = d.default_sampler(schedule, count)
    if t_end == 0.0 and isinstance(schedule, d.VE):
        return
    ours = d.sample(model, x, num_steps=count, t_end=t_end)
    assert jnp.array_equal(ours, d.sample(model, x, solver=solver, grid=grid, num_steps=count, t_end=t_end))


def test_a_grid_of_the_user_is_kept():
    vp = d.VP()
    model = d.Denoiser(lambda t, x, args: 0 * x + 3.0, vp, prediction="data")
    x = jnp.ones(2)
    given = d.sampling_grid(vp, 6)
    assert d.default_sampler(vp, None, given) == (d.iPNDM(3), given)
    assert jnp.isfinite(d.sample(model, x, grid=given)).all()
    assert d.default_sampler(vp, 6, "edm")[1] == "edm"


def test_what_has_no_default_says_so():
    model = d.Denoiser(lambda t, x, args: 0 * x + 3.0, d.VP(), prediction="data")
    with pytest.raises(ValueError, match="pass num_steps="):
        d.sample(model, jnp.ones(2))
    with pytest.raises(ValueError, match="pass solver="):
        d.sample(model, jnp.ones(2), num_steps=5, corrector=d.Langevin(), key=jax.random.key(0))
