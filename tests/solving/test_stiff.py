"""Stiff equations with adaptive implicit steps: the steps of plain diffrax, the values of an independent solver."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")


def robertson(t, y, args):
    a, b, c = -0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return jnp.stack([a + b, -a - b - c, c])


def van_der_pol(mu):
    return lambda t, y, args: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def oregonator(t, y, args):
    s, w, q = 77.27, 0.161, 8.375e-6
    return jnp.stack([s * (y[0] + y[1] * (1 - q * y[0] - y[0])), (y[2] - (1 + y[0]) * y[1]) / s, w * (y[0] - y[2])])


PROBLEMS = {
    "cubic": (lambda t, y, args: -10 * (y**3 - jnp.cos(t)), [2.0], 10.0),
    "robertson": (robertson, [1.0, 0.0, 0.0], 100.0),
    "van der pol 1e3": (van_der_pol(1e3), [2.0, 0.0], 100.0),
    "oregonator": (oregonator, [1.0, 2.0, 3.0], 30.0),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_stiff_equations_take_the_steps_of_diffrax_and_end_where_radau_ends(name):
    field, start, end = PROBLEMS[name]
    controller, y0 = diffrax.PIDController(rtol=1e-6, atol=1e-9), jnp.array(start)
    theirs = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Kvaerno5(), 0.0, end, None, y0, stepsize_controller=controller
    )
    ours = sf.solve(sf.ODE(field), y0, [0.0, end], solver=diffrax.Kvaerno5(), stepsize_controller=controller)
    assert int(ours.stats["num_steps"]) == int(theirs.stats["num_accepted_steps"])
    assert int(ours.stats["num_rejected"]) == int(theirs.stats["num_rejected_steps"])
    np.testing.assert_allclose(ours.final, theirs.ys[0], rtol=1e-10, atol=1e-14)
    compiled = jax.jit(lambda t, y: field(t, y, None))
    exact = solve_ivp(
        lambda t, y: np.asarray(compiled(t, jnp.asarray(y))), (0, end), start, method="Radau", rtol=1e-11, atol=1e-13
    )
    np.testing.assert_allclose(ours.final, exact.y[:, -1], rtol=1e-4, atol=1e-9)


def test_trials_that_fail_are_forgiven_once_a_step_is_past_them():
    # 228 of 439 trials are rejected, many of them as their stages did not converge.
    field, start, end = PROBLEMS["cubic"]
    sol = sf.solve(
        sf.ODE(field), jnp.array(start), [0.0, end], solver=diffrax.Kvaerno5(),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
    )  # fmt: skip
    assert int(sol.stats["num_rejected"]) > 100
    np.testing.assert_allclose(sol.final, -0.9501460933, rtol=1e-4)
