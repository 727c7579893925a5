"""One step: solvers of our own, used like diffrax's, which are used as they are."""

from ._diagonal_milstein import DiagonalMilstein as DiagonalMilstein
from ._exact import Exact as Exact
from ._exponential_adams import ExponentialAdams as ExponentialAdams
from ._exponential_heun import ExponentialHeun as ExponentialHeun
from ._mccallum_foster import McCallumFoster as McCallumFoster
