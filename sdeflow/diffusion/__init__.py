"""Diffusion models: schedules, denoisers, their equations and samplers with exact gradients.

A `Denoiser` is a network with its schedule; `ProbabilityFlow` and `ReverseSDE` are its equations for `sdeflow.solve`,
and `sample` follows the fast samplers, all of them tables of numbers for one scan.
"""

from ._bdia import BDIA as BDIA
from ._defaults import default_sampler as default_sampler
from ._denoiser import AbstractDenoiser as AbstractDenoiser
from ._denoiser import Denoiser as Denoiser
from ._denoiser import Guided as Guided
from ._denoiser import Precondition as Precondition
from ._denoiser import Thresholded as Thresholded
from ._equations import LogSNRFlow as LogSNRFlow
from ._equations import ProbabilityFlow as ProbabilityFlow
from ._equations import ReverseSDE as ReverseSDE
from ._extract import extract_noise as extract_noise
from ._gaussian import GaussianDenoiser as GaussianDenoiser
from ._inverse import DPS as DPS
from ._inverse import ClassifierGuided as ClassifierGuided
from ._inverse import PosteriorGuided as PosteriorGuided
from ._likelihood import bits_per_dim as bits_per_dim
from ._likelihood import log_prob as log_prob
from ._losses import AbstractMatching as AbstractMatching
from ._losses import EDMLoss as EDMLoss
from ._losses import ScoreMatching as ScoreMatching
from ._moves import AbstractConstraint as AbstractConstraint
from ._moves import AbstractCorrector as AbstractCorrector
from ._moves import Langevin as Langevin
from ._moves import Replacement as Replacement
from ._multistep import AbstractSampler as AbstractSampler
from ._multistep import Multistep as Multistep
from ._presets import DDIM as DDIM
from ._presets import DEIS as DEIS
from ._presets import DPMSolver as DPMSolver
from ._presets import DPMSolverPP as DPMSolverPP
from ._presets import UniPC as UniPC
from ._presets import iPNDM as iPNDM
from ._sample import invert as invert
from ._sample import sample as sample
from ._schedule import AbstractSchedule as AbstractSchedule
from ._schedules import EDM as EDM
from ._schedules import VE as VE
from ._schedules import VP as VP
from ._schedules import Cosine as Cosine
from ._schedules import Flow as Flow
from ._schedules import MeanReverting as MeanReverting
from ._schedules import SubVP as SubVP
from ._schedules import Tabulated as Tabulated
from ._singlestep import Singlestep as Singlestep
from ._statistics import Statistics as Statistics
from ._statistics import model_statistics as model_statistics
from ._times import sampling_grid as sampling_grid
from ._v3 import DPMSolverV3 as DPMSolverV3
