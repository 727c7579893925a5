"""Networks that are drifts and diffusions: Lipschitz in the state, bounded where the theory asks for it."""

from ._controlled import ControlledDrift as ControlledDrift
from ._mlp import MLP as MLP
from ._mlp import lipswish as lipswish
from ._noise import NoiseField as NoiseField
from ._noise import NoiseScale as NoiseScale
from ._time import bounded_time as bounded_time
from ._time import circular_time as circular_time
