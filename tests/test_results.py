"""What results print: members of ``sdeflow.RESULTS``, alone and in batches, and what carries them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import sdeflow as sf


def _batch(*members):
    return jax.tree.map(lambda *x: jnp.stack(x), *members)


SHOWN = {
    "success": (sf.RESULTS.successful, "sdeflow.RESULTS<successful>"),
    "a failure": (sf.RESULTS.nonfinite, "sdeflow.RESULTS<The solution became infinite or NaN."),
    "an event": (sf.RESULTS.event_occurred, "event occurred.>"),
    "a batch that succeeds": (_batch(sf.RESULTS.successful, sf.RESULTS.successful), "<all 2 successful>"),
    "a batch that does not": (_batch(sf.RESULTS.successful, sf.RESULTS.nonfinite), "<1 of 2 paths failed. The first: "),
}


@pytest.mark.parametrize("name", SHOWN)
def test_members_are_printed_in_words(name):
    result, words = SHOWN[name]
    assert words in repr(result)
    assert words in str(result)


def test_traced_members_and_shapes_are_printed_too():
    seen = []
    jax.eval_shape(lambda: seen.append(repr(jax.tree.map(jnp.asarray, sf.RESULTS.successful))))
    jax.jit(lambda r: seen.append(repr(r)))(sf.RESULTS.successful)
    assert seen[1] == "sdeflow.RESULTS<traced>"
    assert repr(jax.eval_shape(lambda r: r, sf.RESULTS.successful)) == "sdeflow.RESULTS<unknown>"


def test_the_sentence_of_a_member_is_still_looked_up():
    assert sf.RESULTS[sf.RESULTS.nonfinite].startswith("The solution became infinite")


def test_a_bridge_says_that_it_failed():
    eye = jnp.eye(1)
    bridge = sf.bridges.gaussian_sb(jnp.zeros(1), eye, jnp.ones(1), eye, sf.equations.BrownianMotion(1))
    assert "failed" not in repr(bridge)
    failed = eqx.tree_at(lambda b: b.result, bridge, sf.RESULTS.nonfinite_loss, is_leaf=lambda x: x is None)
    assert "(failed: The training loss was infinite or NaN." in repr(failed)
