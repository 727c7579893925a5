"""Solvers that evaluate the field beyond the end of their step; times that are given as lists or touch a steep place."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

INFUSION = sf.ODE(lambda t, y, args: -0.1 * y + jnp.where((t >= 5) & (t < 20), 1.0, 0.0))
AHEAD = [diffrax.Kvaerno4(), diffrax.Kvaerno5()]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Kvaerno3(), diffrax.KenCarp4()], ids=repr)
def test_a_declared_jump_costs_no_order(solver):
    exact = 10 * (1 - np.exp(-3.5)) - 10 * (1 - np.exp(-2.0))
    if isinstance(solver, diffrax.KenCarp4):
        field = diffrax.MultiTerm(diffrax.ODETerm(INFUSION.drift), diffrax.ODETerm(lambda t, y, args: 0 * y))
    else:
        field = INFUSION
    errors = [
        float(
            sf.solve(
                field, jnp.array(0.0), [0.0, 40.0], solver=solver,
                grid=sf.grids.through([0.0, 40.0], dt0=step, jumps=[5.0, 20.0]),
            ).final - exact
        )
        for step in (1.0, 0.5)
    ]  # fmt: skip
    assert abs(errors[1]) < max(abs(errors[0]) / 6, 1e-9)
    assert abs(errors[0]) < 1e-4


@pytest.mark.parametrize("solver", AHEAD, ids=repr)
@pytest.mark.parametrize("way", ["grid", "adaptive", "end"])
def test_a_solver_that_looks_beyond_a_jump_is_refused(solver, way):
    ts, options = [0.0, 40.0], {}
    if way == "adaptive":
        pid = diffrax.PIDController(rtol=1e-3, atol=1e-5)
        options["stepsize_controller"] = diffrax.ClipStepSizeController(pid, jump_ts=jnp.array([5.0, 20.0]))
    else:
        options["grid"] = sf.grids.through(ts, dt0=1.0, jumps=[5.0, 20.0] if way == "grid" else [40.0])
    with pytest.raises(ValueError, match="other side of a declared jump: use a solver that does not"):
        sf.solve(INFUSION, jnp.array(0.0), ts, solver=solver, **options)


@pytest.mark.parametrize("solver", AHEAD, ids=repr)
def test_a_solver_that_looks_beyond_the_end_of_a_control_says_so(solver):
    t = np.arange(5.0)
    field = sf.ODE(lambda t, y, control: -0.3 * y + control.evaluate(t)[0])
    control = lambda **kwargs: sf.paths.linear_control(t, np.sin(t)[:, None], **kwargs)
    with pytest.raises(ValueError, match='LinearControl has no values: build it with extrapolate="flat"'):
        sf.solve(field, jnp.array(0.0), [0.0, 4.0], args=control(), solver=solver, dt0=0.5)
    held = sf.solve(field, jnp.array(0.0), [0.0, 4.0], args=control(extrapolate="flat"), solver=solver, dt0=0.01).final
    reference = sf.solve(field, jnp.array(0.0), [0.0, 4.0], args=control(), solver=diffrax.Tsit5(), dt0=0.5).final
    np.testing.assert_allclose(held, reference, atol=2e-3)
    assert sf.solve(field, jnp.array(0.0), [0.0, 3.0], args=control(), solver=solver, dt0=0.5).final.shape == ()


@pytest.mark.parametrize(
    "build",
    [
        lambda end: sf.grids.through([0.0, end], dt0=0.1),
        lambda end: sf.grids.through((0.0, end), dt0=0.1),
        lambda end: sf.grids.through([0.0, 2.0], dt0=0.1, jumps=[end]),
        lambda end: sf.grids.uniform(0.0, end, 10),
        lambda end: sf.solve(INFUSION, jnp.array(0.0), [0.0, end], dt0=0.1).final,
    ],
)
def test_a_traced_number_in_a_list_is_refused_in_a_sentence(build):
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda end: jax.tree.leaves(build(end))[0])(1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 50])
def test_a_fixed_time_where_the_field_is_steep_gives_no_nan(steps):
    field = sf.ODE(lambda t, y, args: 0.5 * jnp.sqrt(t))
    final = lambda end: (
        sf.solve(field, jnp.array(1.0), jnp.stack([0.0, end]), steps_per_interval=steps, solver=diffrax.Tsit5()).final
    )
    found = jax.grad(final)(1.0)
    step = 1e-6
    np.testing.assert_allclose(found, (final(1.0 + step) - final(1.0 - step)) / (2 * step), rtol=1e-7)
    np.testing.assert_allclose(found, 0.5, rtol=2e-2 if steps == 1 else 1e-4)
