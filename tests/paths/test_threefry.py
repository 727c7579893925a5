"""``written_out``: the bits of JAX's default generator, for every key that is one of its; what is drawn, to rounding."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.paths._threefry import written_out

SHAPES = [(), (1,), (7,), (3, 5, 2), (0, 3), (1031,)]


def _same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _drawn_alike(a, b):
    # The bits are the same, and so are the uniform numbers. Their logarithms and roots are the compiler's, which may
    # round them otherwise in another loop (jax 0.12 does): by some units in the last place.
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=4 * float(jnp.finfo(a.dtype).eps), atol=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits_are_those_of_jax(shape, width):
    key = jr.key(5)
    _same(jr.bits(written_out(key), shape, f"uint{width}"), jr.bits(key, shape, f"uint{width}"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32", "float64"])
def test_normals_are_those_of_jax_compiled_too(dtype):
    draw = lambda key: jr.normal(key, (33, 4), dtype)
    flat = lambda key: jr.uniform(key, (33, 4), dtype)
    for key in (jr.key(0), jr.PRNGKey(2**40 + 1)):
        _drawn_alike(draw(written_out(key)), draw(key))
        _drawn_alike(jax.jit(lambda key: draw(written_out(key)))(key), jax.jit(draw)(key))
        _same(jax.jit(lambda key: flat(written_out(key)))(key), jax.jit(flat)(key))
    keys = jr.split(jr.key(1), 3)
    _drawn_alike(jax.jit(jax.vmap(lambda key: draw(written_out(key))))(keys), jax.vmap(draw)(keys))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", [0, 3, 2**32 - 1, np.int32(-1), np.int64(2**40 + 3)])
def test_keys_made_of_it_are_those_of_jax(number):
    key = jr.key(7)
    _same(jr.key_data(jr.fold_in(written_out(key), number)), jr.key_data(jr.fold_in(key, number)))
    for shape in (5, (2, 3)):
        _same(jr.key_data(jr.split(written_out(key), shape)), jr.key_data(jr.split(key, shape)))


def test_other_generators_and_other_layouts_of_the_bits_are_left_alone():
    other = jr.key(0, impl="rbg")
    assert written_out(other) is other
    twice = written_out(written_out(jr.key(0)))
    assert jr.key_impl(twice) == jr.key_impl(written_out(jr.key(0)))
    with jax.threefry_partitionable(False):
        _same(jr.normal(written_out(jr.key(0)), (5,)), jr.normal(jr.key(0), (5,)))
        _same(jr.key_data(jr.split(written_out(jr.key(0)), 3)), jr.key_data(jr.split(jr.key(0), 3)))


def test_no_draw_loops_over_the_rounds_of_its_hash():
    # Were this to fail, every step of a solve with a counter would pay for it: see docs/benchmarks.md, row 7.
    draw = lambda key: jr.normal(written_out(key), (64, 8))
    compiled = jax.jit(draw).lower(jr.key(0)).compile()
    assert " while(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 8 * 4


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_rows_are_normals_of_jax_for_either_storage(impl):
    grid, key = sf.grids.uniform(0.0, 11.0, 11).pad(13), jr.key(3, impl=impl)
    like = {"a": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}
    table = sf.paths.GridBrownian(grid, like, key=key).table.W
    counter = sf.paths.GridBrownian(grid, like, key=key, storage="counter")
    for i, name in enumerate("ab"):
        field, shape = jr.fold_in(key, 3 * i), like[name].shape
        _same(table[name][:11], jr.normal(field, (13, *shape))[:11])
        for row in (0, 4, 10):
            wanted = jr.normal(jr.fold_in(jr.fold_in(key, row), 3 * i), shape)
            _same(counter.row(row, jnp.float32(1.0)).W[name], wanted)
