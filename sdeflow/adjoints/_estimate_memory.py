"""What a computation takes of memory, as the compiler planned it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


class Memory(eqx.Module):
    """Bytes that a compiled computation takes; printed in MiB.

    Attributes:
        temporaries: what it needs while it runs; for a gradient, that is what the reverse pass keeps.
        arguments: its inputs.
        outputs: its results.
    """

    temporaries: int
    arguments: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.temporaries + self.arguments + self.outputs

    def __repr__(self) -> str:
        parts = {"temporaries": self.temporaries, "arguments": self.arguments, "outputs": self.outputs}
        return "Memory(" + ", ".join(f"{name} {size / 2**20:.3g} MiB" for name, size in parts.items()) + ")"


def estimate_memory(fn: Callable[..., Any], *args: Any) -> Memory:
    """Say how much memory ``fn(*args)`` takes once it is compiled, without running it.

    The numbers are those of the compiler for the default device. Compare adjoints by them before a long run. What a
    library takes for itself while it runs is not in them: from jax 0.12 on, on a CPU, a matrix product that is fused
    with what follows it is a call of such a library and counts no temporaries.

    Arguments:
        fn: a function that JAX can compile, e.g. ``jax.grad(loss)``.
        args: its arguments; arrays may be replaced by ``jax.ShapeDtypeStruct``.

    Returns:
        A `Memory`, in bytes.

    Raises:
        NotImplementedError: where the backend does not say.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, rate: -rate * y)
        >>> def loss(rate, adjoint):
        ...     return sf.solve(decay, jnp.ones(1000), [0.0, 1.0], args=rate, dt0=0.001, adjoint=adjoint).final.sum()
        >>> rate, keep, thin = jnp.array(1.0), sf.adjoints.DiscreteAdjoint(), sf.adjoints.DiscreteAdjoint("sqrt")
        >>> every, few = (sf.adjoints.estimate_memory(jax.grad(lambda r: loss(r, a)), rate) for a in (keep, thin))
        >>> every.temporaries > 10 * few.temporaries
        True
    """
    traced = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    moving, static = eqx.partition(args, traced)

    def run(moving: Any) -> Any:
        return eqx.filter(fn(*eqx.combine(moving, static)), eqx.is_array)

    found = jax.jit(run).lower(moving).compile().memory_analysis()
    if found is None:
        raise NotImplementedError(f"The backend {jax.default_backend()} does not say how much memory it plans to use.")
    return Memory(found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes)
