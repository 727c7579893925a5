"""What a walk costs: regularisers that make a model cheap to solve."""

from ._base import AbstractRegulariser as AbstractRegulariser
from ._base import Scaled as Scaled
from ._readers import GlobalError as GlobalError
from ._readers import GlobalStiffness as GlobalStiffness
from ._readers import LocalError as LocalError
from ._readers import LocalStiffness as LocalStiffness
from ._states import JacobianFrobenius as JacobianFrobenius
from ._states import Kinetic as Kinetic
from ._states import PathKL as PathKL
from ._states import TaylorDerivative as TaylorDerivative
