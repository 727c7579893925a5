"""Scores of forecasts and classifications, and distances between samples, in pure JAX so that a loss may use them too.

Everywhere a NaN in ``y`` is missing from a score, ``mask`` says what else to leave out, and ``weight`` weighs what is
averaged; both have the shape of ``y`` or of its leading axes. What is missing, or has no weight, changes no value and
no gradient.

Distances compare two clouds of points, ``x`` (n, D) and ``y`` (m, D), and each says its units and how it depends on
how many points there are. ``wasserstein``, ``bw2_uvp`` and ``cbw2_uvp`` are for evaluation alone, as is
``paired_difference``, which compares the scores of two methods: they compute on the host in float64. ``sinkhorn`` is
the solver of entropic transport that bridges use.
"""

from ._classes import accuracy as accuracy
from ._classes import auroc as auroc
from ._coupling import Coupling as Coupling
from ._divergence import sinkhorn_divergence as sinkhorn_divergence
from ._errors import mae as mae
from ._errors import rmse as rmse
from ._forecasts import coverage as coverage
from ._forecasts import crps as crps
from ._forecasts import energy_score as energy_score
from ._gaussians import bw2_uvp as bw2_uvp
from ._gaussians import cbw2_uvp as cbw2_uvp
from ._paired import PairedDifference as PairedDifference
from ._paired import paired_difference as paired_difference
from ._pairs import energy_distance as energy_distance
from ._pairs import mmd as mmd
from ._sinkhorn import sinkhorn as sinkhorn
from ._sliced import sliced_wasserstein as sliced_wasserstein
from ._transport import wasserstein as wasserstein
