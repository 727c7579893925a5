"""``sdeflow.losses``: losses on predictions. They add with ``+`` and scale with ``*``."""

from ._losses import CrossEntropy as CrossEntropy, MaskedMSE as MaskedMSE
from ._sum import (
    AbstractLoss as AbstractLoss,
    AbstractPredictionLoss as AbstractPredictionLoss,
    FunctionLoss as FunctionLoss,
    Sum as Sum,
)
