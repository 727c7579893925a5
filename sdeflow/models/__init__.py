"""Learned equations, and models of data made from them."""

from . import fields as fields
from ._stable import AbstractStableSDE as AbstractStableSDE
from ._stable import NeuralLangevinSDE as NeuralLangevinSDE
from .series import SeriesModel as SeriesModel
