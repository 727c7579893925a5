"""What drives an equation: Brownian motion on a grid, fractional noise, and controls made of data."""

from ._controls import AbstractControl as AbstractControl
from ._factor_brownian import FactorBrownian as FactorBrownian
from ._factor_law import FactorLaw as FactorLaw
from ._fractional_brownian import FractionalBrownian as FractionalBrownian
from ._fractional_gaussian import estimate_hurst as estimate_hurst
from ._fractional_gaussian import fgn_log_prob as fgn_log_prob
from ._fractional_gaussian import fractional_posterior as fractional_posterior
from ._grid_brownian import GridBrownian as GridBrownian
from ._hermite_control import HermiteControl as HermiteControl
from ._hermite_control import hermite_control as hermite_control
from ._linear_brownian import LinearBrownian as LinearBrownian
from ._linear_control import LinearControl as LinearControl
from ._linear_control import linear_control as linear_control
from ._markov_fractional import MarkovFractionalNoise as MarkovFractionalNoise
from ._rectilinear_control import RectilinearControl as RectilinearControl
from ._rectilinear_control import rectilinear_control as rectilinear_control
