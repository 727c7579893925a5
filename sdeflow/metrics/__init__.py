"""Scores: how good forecasts and classifications are, in pure JAX, so that a loss may use them too.

Everywhere a NaN in ``y`` is missing, ``mask`` says what else to leave out, and ``weight`` weighs what is averaged; both
have the shape of ``y`` or of its leading axes. What is missing, or has no weight, changes no value and no gradient.
"""

from ._classes import accuracy as accuracy
from ._classes import auroc as auroc
from ._errors import mae as mae
from ._errors import rmse as rmse
from ._forecasts import coverage as coverage
from ._forecasts import crps as crps
from ._forecasts import energy_score as energy_score
from ._coupling import Coupling as Coupling
from ._sinkhorn import sinkhorn as sinkhorn
