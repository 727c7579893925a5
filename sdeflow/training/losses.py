"""``sdeflow.losses``: losses on predictions. They add with ``+`` and scale with ``*``."""

from ._likelihoods import ELBO as ELBO
from ._likelihoods import EnergyScore as EnergyScore
from ._likelihoods import NegativeLogLikelihood as NegativeLogLikelihood
from ._losses import CrossEntropy as CrossEntropy
from ._losses import MaskedMSE as MaskedMSE
from ._sum import AbstractLoss as AbstractLoss
from ._sum import AbstractPredictionLoss as AbstractPredictionLoss
from ._sum import FunctionLoss as FunctionLoss
from ._sum import Sum as Sum
