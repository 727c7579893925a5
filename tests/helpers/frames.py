"""A linear equation whose coefficients turn with time, and the constant one that it is in the frame that turns along."""

import jax.numpy as jnp
import numpy as np

import sdeflow as sf

# The constant one: rotation and damping, a pull, and noise that is correlated.
A, b, L = np.array([[-0.5, 1.2], [-0.8, -0.3]]), np.array([0.3, -0.2]), np.array([[0.6, 0.0], [0.2, 0.5]])


def turn(angle):
    """The rotation by an angle; its derivative is J turn(angle) with J = [[0, -1], [1, 0]]."""
    return jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])


def constant():
    """The equation of Y."""
    return sf.equations.LinearSDE(A, b, L)


def rotating(w):
    """The equation of X = turn(w t) Y."""
    # The precision of the moment, as tests switch it.
    a, pull, noise, J = (jnp.asarray(v, jnp.result_type(float)) for v in (A, b, L, np.array([[0.0, -1.0], [1.0, 0.0]])))
    return sf.equations.LinearSDE(
        lambda t: turn(w * t) @ a @ turn(w * t).T + w * J, lambda t: turn(w * t) @ pull, lambda t: turn(w * t) @ noise
    )
