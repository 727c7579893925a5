"""Differentiable SDE and ODE solving for scientific machine learning.

Every model is a differential equation; `solve` plans a grid of steps and walks it with a diffrax solver. Everything
else builds an equation, plans the grid, decides how the walk is differentiated, or reads what the walk saw.

The rooms around the core (data, metrics, training, models, bridges, plotting) are imported when they are first used.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

import jax as _jax

from . import adjoints as adjoints
from . import equations as equations
from . import grids as grids
from . import paths as paths
from . import regularisers as regularisers
from . import solvers as solvers
from ._compat import SdeflowWarning as SdeflowWarning
from ._compat import warn_if_bad_jax as _warn_if_bad_jax
from ._results import RESULTS as RESULTS
from ._results import SolveError as SolveError
from ._results import check as check
from ._results import is_okay as is_okay
from .adjoints import check_gradients as check_gradients
from .equations import ODE as ODE
from .equations import SDE as SDE
from .solving import Solution as Solution
from .solving import solve as solve

if TYPE_CHECKING:
    from . import bridges as bridges
    from . import data as data
    from . import diffusion as diffusion
    from . import metrics as metrics
    from . import models as models
    from . import plotting as plotting
    from . import training as training
    from .data import Snapshots as Snapshots
    from .data import TimeSeries as TimeSeries
    from .training import fit as fit
    from .training import losses as losses

__version__ = "0.1.0"

# Name -> the room that holds it; a room stands for itself.
_LATER = {
    "bridges": "bridges",
    "data": "data",
    "diffusion": "diffusion",
    "metrics": "metrics",
    "models": "models",
    "plotting": "plotting",
    "training": "training",
    "Snapshots": "data",
    "TimeSeries": "data",
    "fit": "training",
    "losses": "training",
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sdeflow' has no attribute {name!r}")
    room = _importlib.import_module(f".{_LATER[name]}", __name__)
    value = room if name == _LATER[name] else getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


_warn_if_bad_jax(_jax.__version__)
