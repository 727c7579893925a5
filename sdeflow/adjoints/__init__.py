"""How gradients come back: each adjoint is a way to differentiate the walk."""

from ._base import AbstractWalkAdjoint as AbstractWalkAdjoint
from ._check_gradients import GradientCheck as GradientCheck
from ._check_gradients import check_gradients as check_gradients
from ._discrete import DiscreteAdjoint as DiscreteAdjoint
from ._estimate_memory import Memory as Memory
from ._estimate_memory import estimate_memory as estimate_memory
from ._reversible import ReversibleAdjoint as ReversibleAdjoint
