"""The check of gradients finds what is wrong and nothing else; memory is what the compiler says."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

DECAY = sf.ODE(lambda t, y, args: -args["rate"] * y + args["shift"] * jnp.sin(t))


def _params(dtype=jnp.float64):
    return {"rate": jnp.array([0.7, 1.3], dtype), "shift": jnp.array(0.4, dtype)}


def _loss(params, adjoint, **options):
    y0 = jnp.ones(2, params["rate"].dtype)
    options = {"dt0": 0.1, "solver": dfx.Heun()} | options
    return (sf.solve(DECAY, y0, [0.0, 1.0], args=params, adjoint=adjoint, **options).final ** 2).sum()


def test_exact_gradients_are_okay_and_the_table_says_so():
    check = sf.check_gradients(_loss, _params())
    assert check.okay
    assert check.names == (repr(sf.adjoints.DiscreteAdjoint()).replace("\n", "").replace("  ", ""),)
    assert np.abs(check.slopes[0] - check.finite_slopes).max() < 1e-9 * check.norms[0]
    text = repr(check)
    assert len(text.splitlines()) == 2
    assert "okay" in text


def test_a_reversible_solver_brings_the_reversible_adjoint_into_the_table():
    check = sf.check_gradients(lambda p, a: _loss(p, a, solver=dfx.ReversibleHeun()), _params())
    assert check.okay
    assert len(check.names) == 2
    assert check.differences[1] < 1e-12


def test_float32_gradients_are_okay():
    check = sf.check_gradients(_loss, _params(jnp.float32))
    assert check.okay, check


def test_a_wrong_gradient_is_found():
    @jax.custom_jvp
    def off(x):
        return x

    off.defjvp(lambda x, dx: (x[0], 1.001 * dx[0]))
    check = sf.check_gradients(lambda p, a: off(_loss(p, a)), _params())
    assert not check.okay
    assert check.verdicts == ("not the slope of the loss",)


def test_an_adjoint_that_differs_from_the_first_is_found():
    pair = [sf.adjoints.DiscreteAdjoint(), sf.adjoints.ContinuousAdjoint()]
    check = sf.check_gradients(_loss, _params(), adjoints=pair)
    assert check.verdicts[0] == "okay"
    assert check.verdicts[1] == "not the first adjoint's gradient"
    assert 1e-6 < check.differences[1] < 1e-1


def test_what_is_not_an_array_stays_as_it_is():
    params = {"rate": jnp.ones(2), "name": "decay", "count": 3}
    field = sf.ODE(lambda t, y, args: -args * y)
    loss = lambda p, a: sf.solve(field, jnp.ones(2), [0.0, 1.0], args=p["rate"], dt0=0.2, adjoint=a).final.sum()
    assert sf.check_gradients(loss, params).okay


def test_a_loss_inside_diffeqsolve_is_checked_too():
    def loss(rate, adjoint):
        terms = dfx.ODETerm(lambda t, y, args: -args * y)
        return dfx.diffeqsolve(
            terms, dfx.Heun(), 0.0, 1.0, 0.1, jnp.array(1.0), rate, adjoint=adjoint, max_steps=16
        ).ys[-1]

    assert sf.check_gradients(loss, jnp.array(0.5)).okay


@pytest.mark.parametrize(
    ("loss", "params", "words"),
    [
        (lambda p, a: p["rate"], _params, "must return a floating scalar"),
        (lambda p, a: p["rate"].sum(), _params, "passes its adjoint to no solve"),
        (lambda p, a: _loss(p, a, dt0=None, solver=None), _params, "adaptive solve cannot be checked"),
        (lambda p, a: jnp.array(0.0), lambda: {"rate": 1, "name": "x"}, "params has no floating array"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_sentence(loss, params, words):
    with pytest.raises(ValueError, match=words):
        sf.check_gradients(loss, params())


@pytest.mark.parametrize(("options", "words"), [({"num_directions": 0}, "at least 1"), ({"adjoints": []}, "is empty")])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sf.check_gradients(_loss, _params(), **options)


def test_memory_is_what_the_compiler_says_and_reads_in_mib():
    x = jnp.zeros((256, 1024))
    # Sorted, the matrix must exist: a product and its sum alone may be one call of a library, which keeps no matrix.
    memory = sf.adjoints.estimate_memory(lambda x, scale: jnp.sort(x @ x.T)[:, 0].sum() * scale, x, 2.0)
    assert memory.arguments == x.nbytes
    assert memory.outputs == 8
    assert memory.temporaries >= 256 * 256 * 8
    assert memory.total == memory.temporaries + memory.arguments + memory.outputs
    assert "arguments 2 MiB" in repr(memory)


def test_memory_needs_shapes_only():
    shape = jax.ShapeDtypeStruct((1024,), jnp.float64)
    assert sf.adjoints.estimate_memory(jnp.sin, shape).arguments == 8192


def test_a_backend_that_does_not_say_is_an_error(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    with pytest.raises(NotImplementedError, match="does not say"):
        sf.adjoints.estimate_memory(jnp.sin, jnp.zeros(3))


def test_a_check_is_a_tree_like_any_other():
    assert isinstance(sf.check_gradients(_loss, _params(), num_directions=1), eqx.Module)
