"""Stiff problems under adaptive implicit steps: those of diffrax, right against Radau, and ended where no step leads on."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")


def _robertson(t, y, k):
    made, spent = 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return jnp.stack([-k * y[0] + made, k * y[0] - made - spent, spent])


def _van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


# Field, start, end, argument, and the end by scipy's Radau at rtol 1e-12 (van der Pol: 1e-11).
PROBLEMS = {
    "cubic": (lambda t, y, k: -k * (y**3 - jnp.cos(t)), [2.0], 10.0, 10.0, [-0.9501460933]),
    "Robertson": (_robertson, [1.0, 0.0, 0.0], 1e4, 0.04, [0.1073004285, 4.800166973e-7, 0.8926990914]),
    "van der Pol": (_van_der_pol, [2.0, 0.0], 1e3, 1e3, [-1.8636462548, 7.535430866e-4]),
    "van der Pol, stiffer": (_van_der_pol, [2.0, 0.0], 1e6, 1e6, None),
}
ROWS = [
    ("cubic", dfx.Kvaerno5(), 1e-3),
    ("Robertson", dfx.Kvaerno5(), 1e-6),
    ("van der Pol", dfx.Kvaerno3(), 1e-3),
    pytest.param("van der Pol", dfx.Kvaerno5(), 1e-6, marks=pytest.mark.slow),
    pytest.param("cubic", dfx.Kvaerno3(), 1e-6, marks=pytest.mark.slow),
    pytest.param("Robertson", dfx.Kvaerno3(), 1e-3, marks=pytest.mark.slow),
    # A failed step after the other leads into the layer at the end of a period, and none of them past it.
    pytest.param("van der Pol, stiffer", dfx.Kvaerno5(), 1e-3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "solver", "tol"), ROWS)
def test_a_stiff_solve_takes_the_steps_of_diffrax_and_ends_where_radau_does(name, solver, tol):
    field, y0, t1, k, exact = PROBLEMS[name]
    y0, controller = jnp.array(y0), dfx.PIDController(rtol=tol, atol=tol * 1e-3)
    peer = dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, None, y0, k, stepsize_controller=controller, max_steps=10_000
    )
    sol = sf.solve(
        sf.ODE(field), y0, [0.0, t1], args=k, solver=solver, stepsize_controller=controller, max_steps=10_000
    )
    assert int(sol.stats["num_steps"]) == int(peer.stats["num_accepted_steps"])
    assert int(sol.stats["num_rejected"]) == int(peer.stats["num_rejected_steps"])
    np.testing.assert_allclose(sol.final, peer.ys[0], rtol=1e-12)
    if exact is not None:
        np.testing.assert_allclose(sol.final, exact, rtol=2 * tol)


def test_the_cubic_is_solved_in_float32_inside_jit():
    field, y0, t1, k, exact = PROBLEMS["cubic"]
    with jax.enable_x64(False):
        controller = dfx.PIDController(rtol=1e-3, atol=1e-6)
        run = jax.jit(lambda y: sf.solve(sf.ODE(field), y, np.array([0.0, t1]), args=k, solver=dfx.Kvaerno5(),
                                         stepsize_controller=controller))  # fmt: skip
        sol = run(jnp.array(y0))
    assert sf.is_okay(sol.result)
    np.testing.assert_allclose(sol.final, exact, rtol=1e-4)


@pytest.mark.parametrize("since", [0.5, -1.0])
def test_implicit_steps_into_a_field_of_nan_end_soon(since):
    field = sf.ODE(lambda t, y, since: jnp.where(t > since, jnp.nan, -y))
    controller = dfx.PIDController(rtol=1e-3, atol=1e-6)
    sol = sf.solve(field, jnp.array(1.0), [0.0, 1.0], args=since, solver=dfx.Kvaerno3(), stepsize_controller=controller,
                   max_steps=None, throw=False)  # fmt: skip
    assert sol.result == sf.RESULTS.nonfinite
    assert int(sol.stats["num_steps"] + sol.stats["num_rejected"]) < 250
    np.testing.assert_allclose(sol.stats["time_reached"], max(since, 0.0), atol=1e-6)
