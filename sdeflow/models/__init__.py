"""Learned equations, and models of data made from them."""

from . import fields as fields
from . import series as series
from ._stable import AbstractStableSDE as AbstractStableSDE
from ._stable import NeuralLangevinSDE as NeuralLangevinSDE
from .series import SeriesModel as SeriesModel
from .series import Thinned as Thinned
