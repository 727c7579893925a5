"""What moves: stochastic and ordinary differential equations, and the linear ones that are solved exactly."""

from ._equation import ODE as ODE, SDE as SDE, AbstractEquation as AbstractEquation
from ._geometric import GeometricBrownianMotion as GeometricBrownianMotion
from ._linear import BrownianMotion as BrownianMotion, LinearSDE as LinearSDE, OrnsteinUhlenbeck as OrnsteinUhlenbeck
