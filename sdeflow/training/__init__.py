"""Training: ``fit``, losses on predictions, checkpoints and callbacks. It knows no model and no data set."""

from . import losses as losses
from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._file import CheckpointError as CheckpointError
from ._fit import fit as fit
from ._losses import CrossEntropy as CrossEntropy
from ._losses import MaskedMSE as MaskedMSE
from ._prediction import Prediction as Prediction
from ._result import Event as Event
from ._result import FitResult as FitResult
from ._sum import (
    AbstractLoss as AbstractLoss,
)
from ._sum import (
    AbstractPredictionLoss as AbstractPredictionLoss,
)
from ._sum import (
    FunctionLoss as FunctionLoss,
)
from ._sum import (
    Sum as Sum,
)
