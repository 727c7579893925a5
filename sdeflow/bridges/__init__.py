"""Schrödinger bridges: the law nearest to a linear reference process among those that join two populations.

Reference, then coupling, then drift: a `Bridge` is an equation for `sdeflow.solve`, and its paths can also be drawn
exactly. `gaussian_sb` is closed form, `light_sb` learns a mixture, `sinkhorn_bridge` needs no training. A
`PiecewiseBridge` goes through many days, and `fate` says what cells become.
"""

from ._bridge import Bridge as Bridge
from ._clock import Clock as Clock
from ._fate import Fates as Fates
from ._fate import fate as fate
from ._gaussian import gaussian_sb as gaussian_sb
from ._light import light_loss as light_loss
from ._light import light_sb as light_sb
from ._mixture import MixturePotential as MixturePotential
from ._piecewise import PiecewiseBridge as PiecewiseBridge
from ._sinkhorn import sinkhorn_bridge as sinkhorn_bridge
