"""What drives an equation: Brownian motion on a grid, and controls made of data."""

from ._controls import LinearControl as LinearControl
from ._controls import linear_control as linear_control
from ._grid_brownian import GridBrownian as GridBrownian
