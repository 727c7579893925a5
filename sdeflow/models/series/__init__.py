"""Models of time series: an encoder, an equation driven by the observations, a readout."""

from ._model import SeriesModel as SeriesModel
from ._thinned import Thinned as Thinned
