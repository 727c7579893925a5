"""Schrödinger bridges: the law nearest to a linear reference process among those that join two populations.

Reference, then coupling, then drift: a `Bridge` is an equation for `sdeflow.solve`, and its paths can also be drawn
exactly. `gaussian_sb` is closed form, `light_sb` learns a mixture, `sinkhorn_bridge` needs no training. A
`PiecewiseBridge` goes through many days, and `fate` says what cells become. `interpolate` guesses the cells of a time
without training, and `score_left_out` judges such guesses on days that were left out.
"""

from ._bridge import Bridge as Bridge
from ._clock import Clock as Clock
from ._fate import Fates as Fates
from ._fate import fate as fate
from ._gaussian import gaussian_sb as gaussian_sb
from ._interpolate import interpolate as interpolate
from ._leave_one_out import copy_next as copy_next
from ._leave_one_out import copy_previous as copy_previous
from ._leave_one_out import independent_midpoint as independent_midpoint
from ._leave_one_out import score_left_out as score_left_out
from ._leave_one_out import transport_midpoint as transport_midpoint
from ._light import light_loss as light_loss
from ._light import light_sb as light_sb
from ._mixture import MixturePotential as MixturePotential
from ._piecewise import PiecewiseBridge as PiecewiseBridge
from ._sinkhorn import sinkhorn_bridge as sinkhorn_bridge
