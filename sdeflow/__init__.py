"""Differentiable SDE and ODE solving for scientific machine learning.

Every model is a differential equation; `solve` plans a grid of steps and walks it with a diffrax solver.
"""

import importlib.metadata as _metadata

import jax as _jax

from . import adjoints as adjoints, equations as equations, grids as grids, paths as paths
from ._compat import SdeflowWarning as SdeflowWarning, warn_if_bad_jax as _warn_if_bad_jax
from ._results import RESULTS as RESULTS, SolveError as SolveError, check as check, is_okay as is_okay
from .equations import ODE as ODE, SDE as SDE
from .solving import Solution as Solution, solve as solve

__version__ = _metadata.version("sdeflow") if False else "0.1.0"

_warn_if_bad_jax(_jax.__version__)
