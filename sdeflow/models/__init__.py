"""Learned equations, and models of data made from them."""

from . import fields as fields
from . import series as series
from ._cde import NeuralCDE as NeuralCDE
from ._neural import AbstractNeuralEquation as AbstractNeuralEquation
from ._plain import NeuralODE as NeuralODE
from ._plain import NeuralSDE as NeuralSDE
from ._stable import AbstractStableSDE as AbstractStableSDE
from ._stable import NeuralGeometricSDE as NeuralGeometricSDE
from ._stable import NeuralLangevinSDE as NeuralLangevinSDE
from ._stable import NeuralLinearNoiseSDE as NeuralLinearNoiseSDE
from .series import ODERNN as ODERNN
from .series import FractionalLatentSDE as FractionalLatentSDE
from .series import LatentODE as LatentODE
from .series import LatentSDE as LatentSDE
from .series import SeriesModel as SeriesModel
from .series import Thinned as Thinned
