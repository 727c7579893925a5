"""Where to step: the grid that a solve walks, and the ways to build one."""

from ._build import stack as stack, subdivide as subdivide, through as through, uniform as uniform
from ._grid import Grid as Grid
