"""Models of time series: an encoder, an equation driven by the observations, a readout."""

from ._base import AbstractSeriesModel as AbstractSeriesModel
from ._fractional import FractionalLatentSDE as FractionalLatentSDE
from ._latent import AbstractLatentModel as AbstractLatentModel
from ._latent import LatentODE as LatentODE
from ._latent import LatentSDE as LatentSDE
from ._model import SeriesModel as SeriesModel
from ._ode_rnn import ODERNN as ODERNN
from ._thinned import Thinned as Thinned
