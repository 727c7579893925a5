"""Stable neural SDEs: equations whose noise cannot make them explode, driven by data through their drift.

The three classes share gamma, zeta and sigma and differ in two products:

    Langevin       dz = gamma(zeta(z, X(t))) dt       + sigma(t) dW
    linear noise   dz = gamma(zeta(t, z, X(t))) dt    + sigma(t) z dW
    geometric      dz = z gamma(zeta(t, z, X(t))) dt  + sigma(t) z dW

Source: Oh, Lim and Kim, "Stable neural stochastic differential equations in analyzing irregular time series data",
ICLR 2024, arXiv 2402.14989.
"""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..equations import AbstractEquation
from ._checks import check_size
from .fields import ControlledDrift, NoiseScale


class AbstractStableSDE(AbstractEquation):
    """What the stable classes share: the networks, and how they become a drift and a diffusion.

    A subclass says whether the drift sees the time, and what multiplies gamma and sigma.
    """

    gamma: eqx.AbstractVar[ControlledDrift]
    sigma: eqx.AbstractVar[NoiseScale]
    state_size: eqx.AbstractVar[int]
    control_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """The drift, given the value of gamma."""

    @abc.abstractmethod
    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """The diagonal of the diffusion, given the value of sigma."""
