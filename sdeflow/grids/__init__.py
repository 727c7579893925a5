"""Where to step: the grid that a solve walks, and the ways to build one."""

from ._build import stack as stack
from ._build import subdivide as subdivide
from ._build import through as through
from ._build import uniform as uniform
from ._grid import Grid as Grid
from ._steer import steer_end_time as steer_end_time
