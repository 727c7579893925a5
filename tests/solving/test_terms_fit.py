"""Terms that the solver does not take are one sentence: what it takes, what it was given, what to do."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest

import sdeflow as sf

Y, TS = jnp.ones(3), [0.0, 1.0]
ODE = dfx.ODETerm(lambda t, y, args: -y)
TREE = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), jax.random.key(0), dfx.SpaceTimeLevyArea)
NOISE = dfx.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(0.1 * y), TREE)
REFUSED = {
    "a tuple for a MultiTerm": ((ODE, ODE), dfx.KenCarp3(), Y, r"KenCarp3, .*pass diffrax.MultiTerm\(\*terms\)"),
    "one term for a MultiTerm": (ODE, dfx.KenCarp3(), Y, "KenCarp3, which takes a diffrax.MultiTerm of 2 terms"),
    "one term for noise": (ODE, dfx.ShARK(), Y, "they are ODETerm: pass the terms of both parts"),
    "one term for Milstein": (ODE, dfx.ItoMilstein(), Y, "not compatible with ItoMilstein"),
    "a tuple for Milstein": ((ODE, NOISE), dfx.ItoMilstein(), Y, r"pass diffrax.MultiTerm\(\*terms\)"),
    "three terms for two": (dfx.MultiTerm(ODE, NOISE, NOISE), dfx.ShARK(), Y, "MultiTerm of 2 terms"),
    "a MultiTerm for split terms": (dfx.MultiTerm(ODE, ODE), dfx.SemiImplicitEuler(), (Y, Y), "a tuple of 2 terms"),
    "one term for split terms": (ODE, dfx.SemiImplicitEuler(), (Y, Y), "each moving its part of the state"),
    "split terms of one state": ((ODE, ODE), dfx.SemiImplicitEuler(), Y, "a state that is a tuple of 2"),
    "a tuple for one term": ((ODE, ODE), dfx.Tsit5(), Y, "whose terms are summed"),
    "a tuple of one": ((ODE,), dfx.Tsit5(), Y, "pass the term itself"),
    "plain terms for Langevin": (
        dfx.MultiTerm(ODE, NOISE), dfx.ALIGN(0.1), (Y, Y), r"\(UnderdampedLangevinDriftTerm, UnderdampedLangevinDiff"
    ),
    "an equation of ours": (sf.ODE(lambda t, y, args: -y), dfx.KenCarp3(), Y, "they are DriftTerm"),
    "nothing random for noise": (sf.ODE(lambda t, y, args: -y), dfx.ShARK(), Y, "not compatible with ShARK"),
    "one number for an array": (
        dfx.ODETerm(lambda t, y, args: 0.0), dfx.Euler(), Y, r"e.g. jnp.zeros_like\(y\)"
    ),
    "one number, in an equation": (
        sf.ODE(lambda t, y, args: jnp.zeros(())), dfx.Euler(), Y, r"e.g. jnp.zeros_like\(y\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_terms_that_do_not_fit_are_named(name):
    terms, solver, y0, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as error:
        sf.solve(terms, y0, TS, dt0=0.25, solver=solver)
    assert "\n" not in str(error.value).split("\n-----")[0]


@pytest.mark.parametrize("y0", [None, [Y], {}], ids=["None", "a list", "empty"])
def test_a_start_that_is_none_is_a_sentence(y0):
    with pytest.raises(TypeError, match="y0 must be an array or a tree of arrays"):
        sf.solve(ODE, y0, TS, dt0=0.25, solver=dfx.Euler())


def test_what_a_field_raises_is_what_the_user_sees():
    def field(t, y, args):
        raise TypeError("Oh no!")

    with pytest.raises(TypeError, match="Oh no!"):
        sf.solve(dfx.ODETerm(field), Y, TS, dt0=0.25, solver=dfx.Euler())
