"""Operations on Brownian increments that paths share."""

from typing import Any

import jax.tree_util as jtu


def backwards(row: Any) -> Any:
    """The increment of the path run from the end of a step to its start: W and K change sign, H does not.

    Integrals that weigh the end of a step most say nothing of the way back: NaN.
    """
    signs = {"dt": -1, "W": -1, "H": 1, "K": -1, "normals": 1, "factors": float("nan")}
    fields = {name: getattr(row, name) for name in signs if hasattr(row, name)}
    return type(row)(**{name: jtu.tree_map(lambda x, s=signs[name]: s * x, x) for name, x in fields.items()})
