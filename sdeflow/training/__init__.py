"""Training: ``fit``, losses on predictions, checkpoints and callbacks. It knows no model and no data set."""

from ._checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from ._file import CheckpointError as CheckpointError
from ._fit import fit as fit
from ._losses import CrossEntropy as CrossEntropy, MaskedMSE as MaskedMSE
from ._prediction import Prediction as Prediction
from ._result import Event as Event, FitResult as FitResult
from ._sum import (
    AbstractLoss as AbstractLoss,
    AbstractPredictionLoss as AbstractPredictionLoss,
    FunctionLoss as FunctionLoss,
    Sum as Sum,
)
