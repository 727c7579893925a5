"""How gradients come back: each adjoint is a way to differentiate the walk."""

from ._base import AbstractWalkAdjoint as AbstractWalkAdjoint
from ._discrete import DiscreteAdjoint as DiscreteAdjoint
from ._reversible import ReversibleAdjoint as ReversibleAdjoint
