"""What moves: stochastic and ordinary differential equations, and the linear ones that are solved exactly."""

from ._equation import ODE as ODE, SDE as SDE, AbstractEquation as AbstractEquation
from ._geometric import GeometricBrownianMotion as GeometricBrownianMotion
from ._langevin import Langevin as Langevin, UnderdampedLangevin as UnderdampedLangevin
from ._linear import BrownianMotion as BrownianMotion, LinearSDE as LinearSDE
from ._linear import Momentum as Momentum, OrnsteinUhlenbeck as OrnsteinUhlenbeck
