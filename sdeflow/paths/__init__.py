"""What drives an equation: Brownian motion on a grid, and controls made of data."""

from ._grid_brownian import GridBrownian as GridBrownian
