"""Equal optimisers and losses, made anew, use the program that is compiled already."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdeflow as sf
from sdeflow.training._recognise import recognised

KEY = jax.random.key(0)


class Numbers:
    def batches(self, size, key):
        for k in jax.random.split(key, 3):
            yield np.asarray(jax.random.normal(k, (size, 3)))


def _everywhere(value):
    return lambda params: jax.tree_util.tree_map(lambda _: value, params)


def _scheduled(steps):
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, steps))


# What makes it, and two arguments that differ.
MADE = {
    "adam": (optax.adam, 1e-3, 2e-3),
    "adamw": (lambda decay: optax.adamw(1e-3, weight_decay=decay), 0.1, 0.2),
    "chain": (lambda norm: optax.chain(optax.clip_by_global_norm(norm), optax.sgd(0.1)), 1.0, 2.0),
    "schedule": (_scheduled, 100, 101),
    "array": (lambda rate: optax.sgd(jnp.asarray(rate)), 0.1, 0.2),
    "integer": (optax.sgd, 1, 1.0),
    "hyperparams": (lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate), 1e-3, 2e-3),
    "lbfgs": (lambda size: optax.lbfgs(memory_size=size), 5, 6),
    "accumulated": (lambda every: optax.MultiSteps(optax.adam(1e-3), every), 2, 3),
    "masked": (lambda value: optax.masked(optax.adam(1e-3), _everywhere(value)), True, False),
    "labelled": (
        lambda label: optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(0.1)}, _everywhere(label)), "a", "b",
    ),
    "muon": (optax.contrib.muon, 1e-3, 2e-3),
    "partial": (lambda x: functools.partial(max, x), 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_equal_ones_are_one_object_and_others_are_not(name):
    make, one, other = MADE[name]
    first = recognised(make(one))
    assert recognised(make(one)) is first
    assert recognised(make(other)) is not first
    assert recognised(make(one)) is first


def test_an_equal_optimiser_and_an_equal_loss_compile_nothing():
    traced = []
    mark = traced.append

    def loss_with(scale):
        def loss(model, batch, key, step):
            mark(scale)
            return scale * jnp.mean((jax.vmap(model)(batch) - 1.0) ** 2), {}

        return loss

    def fitted(rate, scale):
        model = eqx.nn.Linear(3, "scalar", key=KEY)
        return sf.fit(model, Numbers(), loss_with(scale), optim=optax.adam(rate), steps=4, batch_size=8, key=KEY,
                      progress=False)  # fmt: skip

    first = fitted(1e-2, 1.0)
    count = len(traced)
    again = fitted(1e-2, 1.0)
    assert len(traced) == count
    np.testing.assert_array_equal(again.model.weight, first.model.weight)
    other = fitted(1e-1, 1.0)
    assert len(traced) > count
    assert abs(other.model.weight - first.model.weight).max() > 0.01
    scaled = fitted(1e-2, 2.0)
    np.testing.assert_allclose(scaled.history["loss"][0], 2.0 * first.history["loss"][0], rtol=1e-6)


def test_what_changed_since_is_not_taken_for_what_it_was():
    scales = [1.0]

    def loss_with(scales):
        return lambda model, batch, key, step: (scales[0] * jnp.sum(model**2), {})

    first = recognised(loss_with(scales))
    assert recognised(loss_with([1.0])) is first
    scales[0] = 2.0
    second = recognised(loss_with([1.0]))
    assert second is not first
    assert float(second(jnp.ones(()), None, None, None)[0]) == 1.0


WEIGHT = np.ones(2)


def _reads_a_global(model, batch, key, step):
    return WEIGHT[0] * jnp.sum(model**2), {}


def _copy_of(function):
    return type(function)(function.__code__, function.__globals__)


def test_globals_that_a_loss_names_are_part_of_it(monkeypatch):
    first = recognised(_copy_of(_reads_a_global))
    assert recognised(_copy_of(_reads_a_global)) is first
    monkeypatch.setitem(globals(), "WEIGHT", np.full(2, 3.0))
    assert recognised(_copy_of(_reads_a_global)) is not first


class Opaque:
    """An object that may hold anything."""

    def __call__(self, model, batch, key, step):
        return jnp.sum(model**2), {}


def test_what_is_not_understood_keeps_its_own_identity():
    one, other = Opaque(), Opaque()
    assert recognised(one) is one
    assert recognised(other) is other
    closing_over = [lambda *args, held=held: held(*args) for held in (one, other)]
    assert recognised(closing_over[0]) is closing_over[0]
    assert recognised(closing_over[1]) is closing_over[1]


def test_few_are_remembered():
    from sdeflow.training import _recognise

    for rate in np.linspace(0.1, 0.2, 70):
        recognised(optax.sgd(float(rate)))
    assert len(_recognise._seen) <= 64
