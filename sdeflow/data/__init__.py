"""Data for training: irregular time series, and readers for files that hold them."""

from ._batch import SeriesBatch as SeriesBatch
from ._series import TimeSeries as TimeSeries
from ._simulated import simulated_series as simulated_series
from ._ts_files import japanese_vowels as japanese_vowels
from ._ts_files import read_ts as read_ts
