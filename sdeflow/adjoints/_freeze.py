"""Constants, as far as derivatives are concerned."""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu


def freeze(tree: Any) -> Any:
    """The tree, whose floating arrays (those that converted closures hold among them) have no derivatives."""
    return jtu.tree_map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)
