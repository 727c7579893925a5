r"""Weights of exponential Adams methods: what a step does with the outputs at its nodes.

    w_j = int_{l_s}^{l_t} k(l) p_j(c(l)) dl,      p_j Lagrange's polynomials on the nodes, in a coordinate c,

by Gauss' rule with 48 nodes, which is exact to the last digits for the kernels and lengths of steps of samplers and,
unlike the closed forms with phi-functions, does not cancel for short steps. Tables are made on the host in float64; the
same lines serve a traced grid, whose gradients then go through them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ._schedule import module_of

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def rule_on(start: Any, end: Any) -> tuple[Any, Any]:
    """Nodes and weights of the quadrature from ``start`` to ``end``, each of shape (R,): shapes (R, 48)."""
    xp, start = module_of(start)
    half = (end - start) / 2
    nodes, weights = xp.asarray(_NODES, start.dtype), xp.asarray(_WEIGHTS, start.dtype)
    return start[:, None] + half[:, None] * (1 + nodes), half[:, None] * weights


def basis(c: Any, at: Any, powers: bool = False) -> Any:
    """Lagrange's polynomials on the nodes ``c`` (R, k) at the points ``at`` (R, Q): shape (R, k, Q).

    Arguments:
        powers: in place of Newton's products use powers of the distance from the first node, which is the "pseudo"
            variant of DPM-Solver-v3: the same up to second order, with smaller weights at higher ones.
    """
    xp, c = module_of(c)
    k = c.shape[1]
    if powers:
        shift = at - c[:, :1]
        # Divided differences are linear in the values, so one table of them serves all.
        table = [xp.stack([xp.ones_like(at) if i == j else xp.zeros_like(at) for i in range(k)], 1) for j in range(k)]
        differences = [d[:, :, :1] for d in table]
        out = differences[0] * xp.ones_like(at)[:, None]
        for order in range(1, k):
            differences = [
                (b - a) / (c[:, i + order] - c[:, i])[:, None, None]
                for i, (a, b) in enumerate(zip(differences[:-1], differences[1:]))
            ]
            out = out + differences[0] * (shift**order)[:, None]
        return out
    rows = []
    for j in range(k):
        p = xp.ones_like(at)
        for m in range(k):
            if m != j:
                p = p * (at - c[:, m, None]) / (c[:, j] - c[:, m])[:, None]
        rows.append(p)
    return xp.stack(rows, 1)


def scalar_weights(start: Any, end: Any, nodes: Any, rate: float, coordinate: Callable[[Any, Any], Any]) -> Any:
    """The weights for the kernel ``exp(rate (l - end))``: shape (R, k) for nodes of shape (R, k)."""
    xp, start = module_of(start)
    points, weights = rule_on(start, end)
    kernel = weights * xp.exp(rate * (points - end[:, None]))
    shift = end[:, None]
    polynomials = basis(coordinate(nodes, shift), coordinate(points, shift))
    return (polynomials * kernel[:, None]).sum(axis=2)


def whole_weight(start: Any, end: Any, rate: float) -> Any:
    """The sum of all weights: the integral of the kernel."""
    xp, start = module_of(start)
    return -xp.expm1(rate * (start - end)) / rate


def half_weights(start: Any, end: Any, nodes: Any, first: int, rate: float) -> Any:
    """Weights on two nodes by the rule that takes the slope at half of the step, as official codes do.

    Arguments:
        nodes: shape (R, 2).
        first: which of them is the start of the step.
    """
    xp, start = module_of(start)
    whole = whole_weight(start, end, rate)
    other = whole * (end - start) / (2 * (nodes[:, 1 - first] - start))
    pair = [whole - other, other]
    return xp.stack(pair if first == 0 else pair[::-1], 1)
