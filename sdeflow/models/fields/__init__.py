"""Networks that are drifts and diffusions: Lipschitz in the state, bounded where the theory asks for it."""

from ._mlp import MLP as MLP, lipswish as lipswish
from ._noise import NoiseScale as NoiseScale
from ._controlled import ControlledDrift as ControlledDrift
