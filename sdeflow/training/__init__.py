"""Training: ``fit``, losses on predictions, checkpoints and callbacks. It knows no model and no data set."""

from . import losses as losses
from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._file import CheckpointError as CheckpointError
from ._fit import fit as fit
from ._prediction import Prediction as Prediction
from ._result import Event as Event
from ._result import FitResult as FitResult
from .losses import ELBO as ELBO
from .losses import AbstractLoss as AbstractLoss
from .losses import AbstractPredictionLoss as AbstractPredictionLoss
from .losses import CrossEntropy as CrossEntropy
from .losses import EnergyScore as EnergyScore
from .losses import FunctionLoss as FunctionLoss
from .losses import MaskedMSE as MaskedMSE
from .losses import NegativeLogLikelihood as NegativeLogLikelihood
from .losses import Sum as Sum
