"""Grids: they land on every requested time, pad at the end only, and refuse what no solver can walk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdeflow as sf
from sdeflow.grids import Grid, stack, subdivide, through, uniform

# ---- Where the steps are. ----


def _saved(grid):
    return np.concatenate([grid.left[:1], grid.right])[np.asarray(grid.save)]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=12),
    start=st.floats(-5.0, 5.0),
    dt0=st.floats(1e-2, 3.0),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_through_lands_exactly_on_every_time_in_equal_steps_of_at_most_dt0(gaps, start, dt0, sign):
    ts = start + sign * np.concatenate([[0.0], np.cumsum(gaps)])
    grid = through(ts, sign * dt0)
    assert (_saved(grid) == ts).all()
    assert (grid.left[1:] == grid.right[:-1]).all()
    h = sign * (grid.right - grid.left)
    assert (h > 0).all()
    assert h.max() <= dt0 * (1 + 1e-9)
    for a, b, gap in zip(grid.save[:-1], grid.save[1:], np.abs(np.diff(ts))):
        np.testing.assert_allclose(h[a:b], gap / (b - a), rtol=1e-9)
        # One step fewer would be too long.
        assert b - a == 1 or gap / (b - a - 1) > dt0 * (1 - 1e-9)


def test_through_without_dt0_takes_one_step_an_interval():
    grid = through([0.0, 0.1, 2.0])
    assert grid.left.tolist() == [0.0, 0.1]
    assert grid.right.tolist() == [0.1, 2.0]
    assert grid.save.tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [3, 7, 10, 100, 1000, 4097])
def test_times_rounded_to_float32_cost_no_extra_step(count):
    ts = np.linspace(0.0, 1.0, count + 1).astype(np.float32)
    assert through(ts, np.float32(1 / count)).num_rows == count
    assert through(np.array([0.0, 1.0], np.float32), 1 / count).num_rows == count


def test_a_gap_that_is_truly_longer_than_dt0_takes_two_steps():
    assert through([0.0, 1.0001], 1.0).num_rows == 2


def test_uniform_is_linspace():
    grid = uniform(1.0, 3.0, 8)
    np.testing.assert_allclose(np.append(grid.left, grid.t1), np.linspace(1, 3, 9), rtol=1e-15)
    assert grid.save.tolist() == [0, 8]
    assert (grid.num_rows, int(grid.num_steps), grid.t0, grid.t1) == (8, 8, 1.0, 3.0)


def test_host_grids_are_float64_so_that_one_grid_serves_every_precision():
    assert through(np.array([0.0, 1.0], np.float32), 0.1).left.dtype == np.float64


# ---- Padding. ----


@pytest.mark.parametrize("extra", [0, 1, 7, 100])
def test_padding_repeats_the_last_live_step_at_the_end(extra):
    bare = through([0.0, 0.5, 2.0], 0.4)
    grid = through([0.0, 0.5, 2.0], 0.4, num_steps=bare.num_rows + extra)
    n = bare.num_rows
    assert grid.num_rows == n + extra
    assert int(grid.num_steps) == n
    assert grid.live.tolist() == [True] * n + [False] * extra
    assert (grid.left[:n] == bare.left).all()
    assert (grid.right[:n] == bare.right).all()
    assert (grid.left[n:] == bare.left[-1]).all()
    assert (grid.right[n:] == bare.right[-1]).all()
    assert (grid.save == bare.save).all()
    assert grid.t1 == bare.t1


def test_padding_twice_is_padding_once():
    bare = through([0.0, 1.0], 0.3)
    once, twice = bare.pad(20), bare.pad(9).pad(20)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice)):
        np.testing.assert_array_equal(a, b)


def test_padding_keeps_jumps():
    bare = Grid(np.array([0.0, 1.0]), np.array([1.0, 2.0]), np.ones(2, bool), np.array([0, 2]), np.array([False, True]))
    assert bare.pad(4).jump.tolist() == [False, True, True, True]


def test_padding_works_on_traced_grids():
    bare = through([0.0, 0.5, 2.0], 0.4)
    traced = jax.jit(lambda grid: grid.pad(9))(bare)
    for a, b in zip(jax.tree.leaves(traced), jax.tree.leaves(bare.pad(9))):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b, np.asarray(a).dtype))


def test_stack_pads_to_the_longest_and_repeats_the_last_saved_time():
    grids = [through([0.0, 1.0], 0.5), through([0.0, 1.0, 3.0], 0.5), through([0.0, 0.2], 0.5)]
    batch = stack(grids)
    assert batch.left.shape == (3, 6)
    assert batch.num_steps.tolist() == [2, 6, 1]
    assert batch.save.tolist() == [[0, 2, 2], [0, 2, 6], [0, 1, 1]]
    assert stack(grids, num_steps=8).left.shape == (3, 8)
    assert batch.jump is None


def test_stack_fills_in_missing_jumps():
    plain = through([0.0, 1.0], 0.5)
    jump = Grid(plain.left, plain.right, plain.live, plain.save, np.array([False, True]))
    assert stack([plain, jump]).jump.tolist() == [[False, False], [False, True]]


def test_subdivide_of_traced_times_is_through_of_known_ones(x64):
    ts = np.array([0.1, 0.4, 1.3])
    traced = jax.jit(lambda ts: subdivide(ts, 3))(ts)
    known = [through(ts[i : i + 2], (ts[i + 1] - ts[i]) / 3) for i in range(2)]
    np.testing.assert_allclose(traced.left, np.concatenate([g.left for g in known]), rtol=1e-15)
    np.testing.assert_allclose(traced.right, np.concatenate([g.right for g in known]), rtol=1e-15)
    assert traced.save.tolist() == [0, 3, 6]


@pytest.mark.parametrize("ts", [[0.0, 0.3, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], ids=["increasing", "decreasing"])
def test_subdivide_turns_repeats_of_the_last_time_into_padding(ts):
    ts = jnp.array(ts)
    different = int((jnp.diff(ts) != 0).sum())
    grid = subdivide(ts, 2)
    assert grid.live.tolist() == [True] * 2 * different + [False] * 2 * (ts.size - 1 - different)
    assert (grid.right[grid.save[1:] - 1] == ts[1:]).all()
    assert (grid.left[1:][grid.live[1:]] == grid.right[:-1][grid.live[1:]]).all()
    dead = ~grid.live
    assert (grid.left[dead] == grid.left[2 * different - 1]).all()
    assert (grid.right[dead] == ts[-1]).all()


def test_coarsen_merges_steps():
    fine = through([0.0, 1.0, 3.0], 0.25)
    coarse = fine.coarsen(2)
    assert coarse.left.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert coarse.save.tolist() == [0, 2, 6]
    assert fine.coarsen(1).right.tolist() == fine.right.tolist()


# ---- What is printed. ----


def test_repr_says_what_there_is():
    assert repr(through([0.0, 0.5, 2.0], 0.5)) == "Grid(4 steps from 0 to 2, 3 saved times)"
    assert "+3 of padding" in repr(through([0.0, 0.5, 2.0], 0.5, num_steps=7))
    batch = stack([through([0.0, 1.0]), through([0.0, 2.0])])
    assert repr(batch) == "Grid(1 rows, traced or batched, 2 saved times)"


# ---- What is refused. ----

_TIMES = {
    "one time": ([0.0], r"at least two times, got shape \(1,\)"),
    "no time": ([], r"at least two times, got shape \(0,\)"),
    "a matrix": ([[0.0, 1.0]], r"one-dimensional with at least two times, got shape \(1, 2\)"),
    "a NaN": ([0.0, np.nan], "ts must be finite; entry 1 is not"),
    "an infinity": ([0.0, 1.0, np.inf], "ts must be finite; entry 2 is not. Where an event"),
    "a repeat": ([0.0, 1.0, 1.0, 2.0], r"ts\[1\]=1 and ts\[2\]=1 are not"),
    "a turn": ([0.0, 1.0, 0.5], r"ts\[1\]=1 and ts\[2\]=0.5 are not"),
    "a turn back up": ([2.0, 1.0, 1.5], r"ts\[1\]=1 and ts\[2\]=1.5 are not"),
    "a repeat at the start": ([0.0, 0.0, 1.0], r"ts\[0\]=0 and ts\[1\]=0 are not"),
}


@pytest.mark.parametrize(("ts", "message"), _TIMES.values(), ids=_TIMES)
def test_times_are_refused(ts, message):
    with pytest.raises(ValueError, match=message):
        through(ts, 0.1)


@pytest.mark.parametrize("dt0", [0.0, -0.1, np.nan, np.inf, -np.inf])
def test_a_wrong_dt0_is_refused(dt0):
    with pytest.raises(ValueError, match=r"dt0 must be finite, not zero and of the sign of ts\[1\]-ts\[0\]=1"):
        through([0.0, 1.0], dt0)


def test_a_positive_dt0_is_refused_for_decreasing_times():
    with pytest.raises(ValueError, match=r"of the sign of ts\[1\]-ts\[0\]=-1, got 0.1"):
        through([1.0, 0.0], 0.1)


def test_traced_times_are_refused_by_name():
    with pytest.raises(ValueError, match="ts is traced.*grid= or steps_per_interval= instead of dt0="):
        jax.jit(lambda ts: through(ts, 0.1).left)(jnp.array([0.0, 1.0]))


def test_a_traced_dt0_is_refused_by_name():
    with pytest.raises(ValueError, match="dt0 is traced.*pass grid= instead"):
        jax.jit(lambda dt0: through([0.0, 1.0], dt0).left)(0.1)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3"])
def test_counts_are_positive_integers(bad):
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got"):
        uniform(0.0, 1.0, bad)
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got"):
        through([0.0, 1.0], 1.0, num_steps=bad)
    with pytest.raises(ValueError, match="steps_per_interval must be a positive integer, got"):
        subdivide(jnp.array([0.0, 1.0]), bad)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="has 10 rows already, which is more than num_steps=9"):
        through([0.0, 1.0], 0.1, num_steps=9)
    with pytest.raises(ValueError, match="has 10 rows already"):
        stack([through([0.0, 1.0], 0.1)], num_steps=9)


def test_stack_of_nothing_is_refused():
    with pytest.raises(ValueError, match="stack needs at least one grid"):
        stack([])


def test_subdivide_wants_one_dimension():
    with pytest.raises(ValueError, match=r"at least two times, got shape \(1, 2\)"):
        subdivide(jnp.array([[0.0, 1.0]]), 2)


_LEFT, _RIGHT, _LIVE, _SAVE = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]), np.ones(3, bool), [0, 3]
_GRIDS = {
    "shapes": ((_LEFT, _RIGHT[:2], _LIVE, _SAVE), r"one shape \(N,\) with N >= 1, got \(3,\), \(2,\), \(3,\)"),
    "no rows": ((_LEFT[:0], _RIGHT[:0], _LIVE[:0], [0, 0]), "one shape .* with N >= 1"),
    "padding first": ((_LEFT, _RIGHT, [False, True, True], [0, 2]), "padding .* must come after all its live"),
    "padding inside": ((_LEFT, _RIGHT, [True, False, True], [0, 2]), "padding .* must come after all its live"),
    "nothing live": ((_LEFT, _RIGHT, [False] * 3, [0, 0]), "padding .* must come after all its live"),
    "two ways": ((_LEFT, [1.0, 0.5, 3.0], _LIVE, _SAVE), "all go one way; step 1 is from 1.0 to 0.5"),
    "an empty step": ((_LEFT, [1.0, 1.0, 3.0], _LIVE, _SAVE), "all go one way; step 1 is from 1.0 to 1.0"),
    "a NaN": ((_LEFT, [1.0, np.nan, 3.0], _LIVE, _SAVE), "must be finite and all go one way; step 1"),
    "save too short": ((_LEFT, _RIGHT, _LIVE, [0, 2]), r"rise from 0 to the number of live steps \(3\), got \[0, 2\]"),
    "save from one": ((_LEFT, _RIGHT, _LIVE, [1, 3]), "rise from 0 to the number of live steps"),
    "save falls": ((_LEFT, _RIGHT, _LIVE, [0, 2, 1, 3]), "rise from 0 to the number of live steps"),
    "a gap": (([0.0, 1.5, 2.0], [1.0, 2.0, 3.0], _LIVE, _SAVE), "step 1 begins at 1.5, but step 0 ends at 1"),
    "an overlap": (([0.0, 0.5, 2.0], [1.0, 2.0, 3.0], _LIVE, _SAVE), "step 1 begins at 0.5, but step 0 ends at 1"),
}


@pytest.mark.parametrize(("arrays", "message"), _GRIDS.values(), ids=_GRIDS)
def test_a_grid_that_cannot_be_walked_is_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        Grid(*(np.asarray(x) for x in arrays))


@pytest.mark.parametrize(("offset", "ok"), [(1e3, True), (1e4, True), (1e6, False), (1.7e9, False)])
def test_steps_below_the_resolution_of_the_times_are_refused(offset, ok):
    build = lambda: through([offset, offset + 1.0], 0.01)
    if ok:
        assert build().num_rows == 100
        return
    with pytest.raises(ValueError, match="below 8 units in the last place .* in float32 .*: shift and scale"):
        build()


def test_steps_that_float32_cannot_tell_apart_are_fine_in_float64(x64):
    assert through([1.7e9, 1.7e9 + 3600], 60.0).num_rows == 60


def test_coarsen_refuses_what_does_not_fit():
    fine = through([0.0, 1.0, 1.75], 0.25)
    with pytest.raises(ValueError, match=r"k=2 must divide the number of steps before every saved time, \[0, 4, 7\]"):
        fine.coarsen(2)
    with pytest.raises(ValueError, match="k=0 must divide"):
        fine.coarsen(0)
    with pytest.raises(ValueError, match="Only a concrete grid without padding"):
        fine.pad(10).coarsen(1)
    jump = Grid(_LEFT[:2], _RIGHT[:2], _LIVE[:2], np.array([0, 2]), np.array([False, True]))
    with pytest.raises(ValueError, match="Merging 2 steps would hide a jump inside a step"):
        jump.coarsen(2)


def test_a_grid_is_a_module_that_can_be_mapped_over():
    batch = sf.grids.stack([through([0.0, 1.0], 0.5), through([0.0, 3.0], 0.5)])
    lengths = jax.vmap(lambda grid: jnp.where(grid.live, grid.right - grid.left, 0.0).sum())(batch)
    assert lengths.tolist() == [1.0, 3.0]


# ---- Jumps. ----


def test_one_step_ends_just_before_a_jump_and_the_next_begins_just_after():
    grid = through([0.0, 1.0], 0.25, jumps=[0.6])
    before, after = np.nextafter(0.6, 0.0), np.nextafter(0.6, 1.0)
    np.testing.assert_array_equal(grid.right[2:4], [before, 0.8])
    assert grid.left[3] == after
    np.testing.assert_allclose(grid.left, [0.0, 0.2, 0.4, 0.6, 0.8], rtol=1e-15)
    assert grid.jump.tolist() == [False, False, False, True, False]
    assert grid.save.tolist() == [0, 5]
    assert through([0.0, 1.0], 0.25).jump is None
    assert through([0.0, 1.0], 0.25, jumps=[]).jump.tolist() == [False] * 4


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(1e-2, 5.0), min_size=1, max_size=6),
    places=st.lists(st.floats(0.0, 1.0), max_size=6),
    start=st.floats(-5.0, 5.0),
    dt0=st.floats(0.05, 3.0),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_no_step_goes_across_a_jump_and_every_time_is_reached(gaps, places, start, dt0, sign):
    ts = start + sign * np.concatenate([[0.0], np.cumsum(gaps)])
    jumps = ts[0] + (ts[-1] - ts[0]) * np.round(places, 3)
    # Steps of next to no length are refused, whether of jumps or not.
    knots = np.unique(np.concatenate([ts, jumps]))
    if np.diff(knots).min() < 1e-3:
        return
    grid = through(ts, sign * dt0, jumps=jumps)
    np.testing.assert_allclose(_saved(grid), ts, rtol=1e-15, atol=1e-300)
    low, high = np.minimum(grid.left, grid.right), np.maximum(grid.left, grid.right)
    for at in jumps:
        assert ((high < at) | (low > at)).all()
    assert (high - low).max() <= dt0 * (1 + 1e-9)
    assert grid.jump.sum() == len(set(jumps.tolist()) - {ts[-1]})


def test_jumps_may_be_unsorted_repeated_and_on_requested_times():
    grid = through([0.0, 0.5, 1.0], 0.25, jumps=[0.5, 0.3, 0.5])
    assert grid.save.tolist() == [0, 3, 5]
    assert grid.jump.tolist() == [False, False, True, True, False]
    assert grid.right[2] == np.nextafter(0.5, 0.0)
    # A time that was rounded is the same time.
    rounded = through(np.array([0.0, 0.3, 1.0], np.float32), 0.25, jumps=[0.3])
    assert rounded.num_rows == through(np.array([0.0, 0.3, 1.0], np.float32), 0.25).num_rows


def test_a_jump_at_zero_is_passed_by_with_normal_numbers():
    grid = through([-1.0, 1.0], 1.0, jumps=[0.0])
    tiny = np.finfo(np.float64).tiny
    assert (grid.right[0], grid.left[1]) == (-tiny, tiny)


def test_jumps_come_before_padding_and_go_with_coarser_steps():
    grid = through([0.0, 1.0], 0.125, num_steps=12, jumps=[0.5])
    assert int(grid.num_steps) == 8
    assert grid.jump.tolist() == [i == 4 for i in range(12)]
    coarse = through([0.0, 1.0], 0.125, jumps=[0.5]).coarsen(2)
    assert coarse.jump.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="would hide a jump inside a step"):
        through([0.0, 1.0], 0.125, jumps=[0.125]).coarsen(2)


@pytest.mark.parametrize(
    ("jumps", "words"),
    [
        ([0.5, 1.5], r"jumps\[1\]=1.5 lies outside of ts, which runs from 0 to 1"),
        ([-0.1], r"jumps\[0\]=-0.1 lies outside of ts"),
        ([np.nan], "jumps must be finite and one-dimensional"),
        ([[0.5]], "jumps must be finite and one-dimensional"),
        (0.5, "jumps must be finite and one-dimensional"),
    ],
)
def test_jumps_that_no_grid_can_have_are_refused(jumps, words):
    with pytest.raises(ValueError, match=words):
        through([0.0, 1.0], 0.25, jumps=jumps)


def test_traced_jumps_are_refused():
    with pytest.raises(ValueError, match="jumps is traced"):
        jax.jit(lambda at: through([0.0, 1.0], 0.25, jumps=at).left)(jnp.array([0.5]))
