"""Data for training: irregular time series, snapshots of populations, samples, and what reads and writes them."""

from ._batch import SeriesBatch as SeriesBatch
from ._growth import growth_weights as growth_weights
from ._protocols import HeldOut as HeldOut
from ._protocols import leave_one_out as leave_one_out
from ._protocols import msci_setups as msci_setups
from ._samples import Samples as Samples
from ._samples import SamplesBatch as SamplesBatch
from ._series import TimeSeries as TimeSeries
from ._simulated import simulated_series as simulated_series
from ._simulated_cells import simulated_cells as simulated_cells
from ._snapshots import Snapshots as Snapshots
from ._ts_files import japanese_vowels as japanese_vowels
from ._ts_files import read_ts as read_ts
from ._velocity import write_velocity as write_velocity
