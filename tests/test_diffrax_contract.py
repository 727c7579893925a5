"""The private parts of diffrax and equinox that we stand on: one test for each item of ``sdeflow/_compat.py``."""

import dataclasses
import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import sdeflow as sf
from sdeflow import _compat
from sdeflow._results import RESULTS
from sdeflow.paths._tree import quiet, quiet_tree


class _Spy(diffrax.AbstractAdjoint):
    """Hands on to diffrax's default, and keeps what it was given."""

    seen: list = eqx.field(static=True)

    def loop(self, **kwargs):
        self.seen.append(kwargs)
        return diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)


def _seen(**options):
    seen: list = []
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.05, (), key=jax.random.key(0))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y), diffrax.ControlTerm(lambda t, y, args: jnp.array(0.1), path)
    )
    call = {"t0": 0.0, "t1": 1.0, "dt0": 0.25, "y0": jnp.array(1.0), **options}
    sol = diffrax.diffeqsolve(terms, diffrax.Heun(), adjoint=_Spy(seen), **call)
    return sol, seen[0]


def test_the_loop_of_an_adjoint_is_given_what_ours_read():
    ours = {"args", "terms", "solver", "stepsize_controller", "event", "saveat", "t0", "t1", "max_steps", "throw"}
    ours |= {"init_state", "passed_solver_state", "passed_controller_state", "progress_meter", "dt0"}
    assert set(inspect.signature(diffrax.AbstractAdjoint.loop).parameters) - {"self"} == ours
    assert set(_seen()[1]) == ours


def test_every_term_comes_wrapped_for_its_direction_and_unwrap_takes_that_off():
    _, given = _seen()
    terms, direction = _compat.unwrap(given["terms"])
    assert [type(t) for t in terms.terms] == [diffrax.ODETerm, diffrax.ControlTerm]
    assert direction is not None
    assert all(isinstance(t, _compat.WrapTerm) for t in given["terms"].terms)
    plain = diffrax.ODETerm(lambda t, y, args: y)
    assert _compat.unwrap(plain) == (plain, 1)


def test_the_state_of_the_loop_has_the_fields_that_ours_replace():
    _, given = _seen()
    state = given["init_state"]
    names = {f.name for f in dataclasses.fields(state)}
    assert {"y", "tprev", "tnext", "made_jump", "solver_state", "controller_state", "result"} <= names
    assert {"num_steps", "num_accepted_steps", "save_state"} <= names
    assert state.made_jump is False
    assert _compat.is_save_state(jax.tree.leaves(state.save_state, is_leaf=_compat.is_save_state)[0])
    fields = [f.name for f in dataclasses.fields(_compat.SaveState)]
    assert fields == ["saveat_ts_index", "ts", "ys", "save_index"]


@pytest.mark.parametrize("dt0", [0.25, 0.3])
def test_constant_steps_stand_where_our_formula_puts_them(dt0):
    # The controller's state holds the number of steps; the times are t0 + (t1 - t0) i / n after a first step of dt0.
    counts: list = []

    class Count(_Spy):
        def loop(self, **kwargs):
            counts.append(kwargs["init_state"].controller_state)
            return super().loop(**kwargs)

    ode = diffrax.ODETerm(lambda t, y, args: -y)
    sol = diffrax.diffeqsolve(
        ode, diffrax.Euler(), 0.0, 1.0, dt0, jnp.array(1.0), adjoint=Count([]), saveat=diffrax.SaveAt(steps=True)
    )
    assert len(counts[0]) == 4
    n = int(np.ceil(1.0 / dt0))
    want = np.arange(1, n + 1) / n
    want[0] = dt0
    np.testing.assert_allclose(np.asarray(sol.ts)[:n], want, rtol=1e-6)


def test_the_loop_takes_while_loops_of_another_kind():
    sol, given = _seen()
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    names = ("throw", "passed_solver_state", "passed_controller_state")
    kwargs = {k: v for k, v in given.items() if k not in names}
    parameters = set(inspect.signature(adjoint._loop).parameters)
    assert set(kwargs) | {"inner_while_loop", "outer_while_loop"} == parameters
    assert callable(_compat.lax_while_loop)


def test_a_buffer_of_a_loop_is_recognised_and_written():
    kinds = []

    def body(carry):
        i, rows = carry
        kinds.append(_compat.is_buffer(rows))
        return i + 1, _compat.buffer_at_set(rows, i, 2.0 * i)

    start = (jnp.array(0), jnp.zeros(3))
    out = _compat.lax_while_loop(lambda c: c[0] < 3, body, start, max_steps=None, buffers=lambda c: c[1])
    np.testing.assert_array_equal(out[1], [0.0, 2.0, 4.0])
    assert all(kinds)
    assert not _compat.is_buffer(jnp.zeros(3))
    np.testing.assert_array_equal(_compat.buffer_at_set(jnp.zeros(2), 1, 3.0), [0.0, 3.0])


def test_enumerations_can_be_read():
    assert _compat.enumeration_of(diffrax.RESULTS.successful) is diffrax.RESULTS
    assert _compat.messages(diffrax.RESULTS)[int(_compat.values_of(diffrax.RESULTS.successful))] == ""
    assert {"successful", "nonfinite", "max_steps_reached", "event_occurred"} <= set(_compat.names(diffrax.RESULTS))
    assert set(_compat.names(diffrax.RESULTS)) <= set(_compat.names(RESULTS))
    for name in _compat.names(diffrax.RESULTS):
        promoted = RESULTS.promote(getattr(diffrax.RESULTS, name))
        assert int(_compat.values_of(promoted)) == int(_compat.values_of(getattr(RESULTS, name)))


def test_stage_loops_have_a_kind_that_can_be_set():
    for solver in (diffrax.Tsit5(), diffrax.Heun(), diffrax.Kvaerno3(), diffrax.ShARK(), diffrax.SPaRK()):
        assert solver.scan_kind is None
        assert dataclasses.replace(solver, scan_kind="lax").scan_kind == "lax"


def test_implicit_solvers_mark_the_tolerances_that_they_leave_open():
    finder = diffrax.Kvaerno3().root_finder
    assert finder.rtol is _compat.use_stepsize_tol
    assert finder.atol is _compat.use_stepsize_tol
    assert dataclasses.replace(finder, rtol=1e-3).rtol == 1e-3


@pytest.mark.parametrize("solver", [diffrax.ImplicitEuler, diffrax.Kvaerno3, diffrax.KenCarp3])
def test_the_state_of_an_implicit_stage_is_found_among_what_its_root_depends_on(solver):
    h, start, found = 0.25, jnp.array([3.0, -1.0]), []

    class Spy(optx.Newton):
        def terminate(self, fn, y, args, options, state, tags):
            found.append(_compat.moved_by(args, state.diff))
            return super().terminate(fn, y, args, options, state, tags)

    field = diffrax.ODETerm(lambda t, y, args: -y)
    terms = diffrax.MultiTerm(field, field) if solver is diffrax.KenCarp3 else field
    solver = solver(root_finder=Spy(1e-5, 1e-5, norm=optx.rms_norm))
    diffrax.diffeqsolve(terms, solver, 0.0, h, h, start, max_steps=1)
    assert found, "no stage was seen"
    assert all(jax.tree.map(jnp.shape, stage) == ((2,), (2,)) for stage in found)
    # By hand for each of the three forms of a stage: slopes, increments, implicit Euler.
    y, one = jnp.array([3.0, -1.0]), jnp.ones(2)
    product = lambda slope, control: control * slope
    for relation, factor in (
        ((0, 0.5, None, product, 0.0, y, None, h), 0.5 * h), ((0, 0.5, None, 0.0, y, None, h), 0.5),
        ((None, 0.0, y, None, h), 1.0),
    ):  # fmt: skip
        at, move = _compat.moved_by(relation, one)
        np.testing.assert_allclose(at, y)
        np.testing.assert_allclose(move, factor * one)
    assert _compat.moved_by(None, one) is None


def test_concreteness_is_seen_through_a_tracer():
    seen = []
    jax.jit(lambda x: seen.append(_compat.is_concrete(x)) or x)(1.0)
    assert seen == [False]
    assert _compat.is_concrete(jnp.ones(2), np.ones(2), 1.0)


def test_one_of_many_is_seen_through_derivatives_but_not_through_a_jit():
    seen = []
    f = lambda x: (seen.append(_compat.under_vmap(x)), x.sum())[1]
    jax.vmap(f)(jnp.ones((2, 3)))
    jax.vmap(jax.grad(f))(jnp.ones((2, 3)))
    jax.vmap(jax.jit(f))(jnp.ones((2, 3)))
    f(jnp.ones(3))
    assert seen == [True, True, False, False]


def test_what_varies_over_a_mesh_is_known_and_can_be_said():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("b",))
    spec, found = jax.sharding.PartitionSpec("b"), []

    def f(x):
        still = jnp.ones(3)
        found.extend(map(_compat.varies_over, (x, still, _compat.vary(still, _compat.varies_over(x)))))
        return x

    jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(3))
    assert found == [{"b"}, frozenset(), {"b"}]


def test_what_a_jaxpr_does_not_need_of_its_inputs_can_be_told():
    jaxpr = jax.make_jaxpr(jax.jit(lambda x, y: jnp.ones_like(x) * y))(1.0, 2.0).jaxpr
    assert _compat.dce_jaxpr(jaxpr, [True])[1] == [False, True]


@pytest.mark.parametrize("area", [diffrax.BrownianIncrement, diffrax.SpaceTimeTimeLevyArea])
def test_a_tree_that_calls_nothing_back_is_diffrax_s_tree_and_answers_nan_outside_of_it(area):
    shape = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}
    loud = diffrax.VirtualBrownianTree(0.5, 2.0, 1e-3, shape, key=jax.random.key(3), levy_area=area)
    made = quiet_tree(jnp.array(0.5), jnp.array(2.0), 1e-3, shape, jax.random.key(3), area)
    ask = jax.jit(lambda path, a, b: path.evaluate(a, b, use_levy=True))
    wanted = jax.tree.leaves(ask(loud, jnp.array(0.7), jnp.array(1.9)))
    for tree in (quiet(loud), made):
        assert isinstance(tree, diffrax.VirtualBrownianTree)
        for a, b in zip(jax.tree.leaves(ask(tree, jnp.array(0.7), jnp.array(1.9))), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        for a, b in ((0.4, 1.0), (1.0, 2.1)):
            out = ask(tree, jnp.array(a), jnp.array(b))
            assert all(np.isnan(x).all() for x in jax.tree.leaves(out.W))
        assert "callback" not in jax.jit(lambda t, tree=tree: tree.evaluate(t)).lower(1.0).as_text()
    assert quiet(made) is made
    other = diffrax.UnsafeBrownianPath((2,), jax.random.key(0))
    assert quiet(other) is other


def test_terms_are_compared_with_the_solver_by_a_function_that_names_what_does_not_fit():
    term, solver, y = diffrax.ODETerm(lambda t, y, args: -y), diffrax.KenCarp3(), jnp.ones(2)
    how = solver.term_structure, solver.term_compatible_contr_kwargs
    with pytest.raises(_compat.TermAndSolverIncompatible):
        _compat.assert_term_compatible(0.0, y, None, term, *how)
    _compat.assert_term_compatible(0.0, y, None, diffrax.MultiTerm(term, term), *how)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_type_of_a_value_says_over_which_axes_it_varies_and_can_be_changed(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    axes = {"i"} if check_vma else set()

    def seen(x):
        assert _compat.varying_axes(x) == axes
        assert _compat.varying_axes(jnp.zeros(2)) == set()
        bare = _compat.typed_as_varying(jax.typeof(x), (), jax.sharding.AbstractMesh((), ()))
        assert bare.sharding.mesh.empty
        again = _compat.typed_as_varying(bare, tuple(axes), jax.sharding.get_abstract_mesh())
        assert again == jax.typeof(x)
        return x

    spec = jax.sharding.PartitionSpec("i")
    jax.jit(jax.shard_map(seen, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))(jnp.ones(2))


def test_the_number_of_steps_of_known_times_is_known_while_tracing():
    found = []

    class Spy(sf.adjoints.DiscreteAdjoint):
        def loop(self, **kwargs):
            found.append(_compat.known_value(kwargs["init_state"].controller_state[1]))
            return super().loop(**kwargs)

    def run(t1, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y), diffrax.Tsit5(), 0.0, t1, 0.1, y0, adjoint=Spy()
        ).ys

    run(1.0, jnp.ones(2))
    jax.jit(jax.grad(lambda y0: run(1.25, y0).sum()))(jnp.ones(2))
    jax.jit(run)(1.0, jnp.ones(2))
    jax.vmap(run, in_axes=(0, None))(jnp.array([1.0, 2.0]), jnp.ones(2))
    assert found == [10, 13, None, None]


@pytest.mark.parametrize("solver", [diffrax.Kvaerno3(), diffrax.KenCarp3(), diffrax.ImplicitEuler()])
def test_implicit_steps_look_up_their_root_finder_in_a_namespace_that_can_name_the_adjoint(solver):
    used = []

    class Adjoint(optx.ImplicitAdjoint):
        def apply(self, *args):
            used.append(True)
            return super().apply(*args)

    before = type(solver).step
    same = _compat.finding_roots_with(solver, Adjoint())
    terms = diffrax.ODETerm(lambda t, y, args: -y)
    terms = diffrax.MultiTerm(terms, terms) if isinstance(solver, diffrax.KenCarp3) else terms
    run = lambda one: diffrax.diffeqsolve(terms, one, 0.0, 0.2, 0.1, jnp.ones(2),
                                          stepsize_controller=diffrax.PIDController(1e-3, 1e-6)).ys  # fmt: skip
    np.testing.assert_array_equal(run(same), run(solver))
    assert used
    assert isinstance(same, type(solver))
    assert type(solver).step is before
    assert _compat.finding_roots_with(diffrax.Tsit5(), Adjoint()).tableau is diffrax.Tsit5.tableau
