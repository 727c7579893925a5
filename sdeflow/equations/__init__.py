"""What moves: stochastic and ordinary differential equations, and the linear ones that are solved exactly."""

from ._chart import Chart as Chart
from ._equation import ODE as ODE
from ._equation import SDE as SDE
from ._equation import AbstractEquation as AbstractEquation
from ._fractional import FractionalSDE as FractionalSDE
from ._fractional import FractionalState as FractionalState
from ._fractional_bridge import FractionalBridge as FractionalBridge
from ._geometric import GeometricBrownianMotion as GeometricBrownianMotion
from ._langevin import Langevin as Langevin
from ._langevin import UnderdampedLangevin as UnderdampedLangevin
from ._linear import BrownianMotion as BrownianMotion
from ._linear import LinearSDE as LinearSDE
from ._linear import Momentum as Momentum
from ._linear import OrnsteinUhlenbeck as OrnsteinUhlenbeck
