"""Tables followed in NumPy, without a program to compile: orders, the algorithm of UniPC, v3 on normal data."""

import math

import numpy as np
import pytest

from sdeflow.diffusion import DEIS, EDM, VP, DPMSolver, DPMSolverPP, DPMSolverV3, Flow, Singlestep, Statistics, UniPC
from sdeflow.diffusion._times import knots
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")


def followed(solver, steps, schedule, noise, x, grid="logsnr", t_end=None):
    """The end of a sampler, from the description of a table alone."""
    times = knots(schedule, steps, grid, t_end)
    table = solver.table(schedule, times, grid, steps)
    base, outputs = x, []
    total = lambda weights: sum(w * m for w, m in zip(weights, outputs))
    for i, t in enumerate(table.t):
        eps = noise(t, x)
        if table.reads is None:
            out = table.read_x[i] * x + table.read_noise[i] * eps
        else:
            out = eps if table.reads == "noise" else (x - schedule.sigma(t) * eps) / schedule.alpha(t)
        outputs.insert(0, out)
        begun = x if table.fix is None else x + total(table.fix[i])
        base = begun if table.fresh is None or table.fresh[i] else base
        x = table.keep[i] * base + total(table.out[i]) + (0 if table.offset is None else table.offset[i])
    return x


def mixture(t, x):
    return gmm.noise_of(x, VP().alpha(t), VP().sigma(t), xp=np)


# Those orders of the table of known ones that no other quick test looks at.
ORDERS = {
    "DPM++2M": (DPMSolverPP(2, lower_order_final=False), "logsnr", 2),
    "DPM-3M": (DPMSolver(3, lower_order_final=False), "logsnr", 3),
    "DPM++4M": (DPMSolverPP(4, lower_order_final=False), "logsnr", 4),
    "rhoAB2": (DEIS(3, "rho"), "logsnr", 3),
    "tAB2": (DEIS(3, "t"), "quadratic", 3),
    "UniPC-1": (UniPC(1, lower_order_final=False), "logsnr", 2),
    "UniPC-2": (UniPC(2, lower_order_final=False), "logsnr", 3),
    "UniPC-3": (UniPC(3, lower_order_final=False), "logsnr", 4),
    "DPM-2S": (Singlestep(2), "logsnr", 2),
    "DPM++2S": (Singlestep(2, "data"), "logsnr", 2),
    "DPM++3S": (Singlestep(3, "data"), "logsnr", 3),
    "rho-Heun": (Singlestep(method="heun"), "logsnr", 2),
    "rho-RK3": (Singlestep(method="kutta"), "logsnr", 3),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name):
    solver, grid, order = ORDERS[name]
    x, wanted = gmm.starts(32), gmm.reference(32)
    errors = [gmm.median(followed(solver, n, VP(), mixture, x, grid), wanted) for n in (128, 256)]
    assert np.log2(errors[0] / errors[1]) > order - 0.25


def published(schedule, times, noise, x, order, reads, b_of_h):
    """UniPC as its paper has it: a system R rho = b with the function B(h) in it, 1/2 where there is one unknown."""
    alpha, sigma, l = schedule.alpha(times), schedule.sigma(times), schedule.log_snr(times)
    sign = -1.0 if reads == "data" else 1.0

    def updated(x, past, k, new=None):
        i = past[0][0]
        h, m0 = l[i + 1] - l[i], past[0][1]
        z = sign * h
        b = z if b_of_h == "bh1" else np.expm1(z)
        ratios = [(l[j] - l[i]) / h for j, _ in past[1:k]] + [1.0]
        phi, right = np.expm1(z) / z - 1, []
        for n in range(1, k + 1):
            right.append(phi * math.factorial(n) / b)
            phi = phi / z - 1 / math.factorial(n + 1)
        matrix = np.array([[r**n for r in ratios] for n in range(k)])
        right, gaps = np.array(right), [(m - m0) / r for (_, m), r in zip(past[1:k], ratios)]
        if new is None:
            matrix, right = matrix[:-1, :-1], right[:-1]
        else:
            gaps.append(new - m0)
        rho = np.full(1, 0.5) if len(right) == 1 else np.linalg.solve(matrix, right)
        size, keep = (alpha, sigma) if reads == "data" else (sigma, alpha)
        mixed = sum(r * gap for r, gap in zip(rho, gaps))
        return keep[i + 1] / keep[i] * x - size[i + 1] * (np.expm1(z) * m0 + b * mixed)

    past, k, last = [], 0, len(times) - 1
    for i in range(last):
        out = noise(times[i], x)
        out = out if reads == "noise" else (x - sigma[i] * out) / alpha[i]
        if i:
            x = updated(before, past, k, out)  # noqa: F821
        past.insert(0, (i, out))
        k, before = min(order, i + 1, last - i), x  # noqa: F841
        x = updated(x, past, k)
    return x


@pytest.mark.parametrize("reads", ["data", "noise"])
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()], ids=["VP", "Flow", "EDM"])
def test_unipc_is_the_published_algorithm(schedule, reads):
    noise = lambda t, x: np.tanh(x / (1 + schedule.sigma(t))) + 0.3 * np.cos(x * schedule.alpha(t))
    x = schedule.prior_std() * gmm.starts(4)
    for grid in ("logsnr", "edm"):
        times = knots(schedule, 7, grid, None)
        for order in (1, 2, 3, 4):
            found = followed(UniPC(order, reads=reads, lower_order_final=True), 7, schedule, noise, x, grid)
            np.testing.assert_allclose(found, published(schedule, times, noise, x, order, reads, "bh2"), rtol=1e-9)


def test_from_three_nodes_on_unipc_does_not_depend_on_b():
    # With the same start of two steps, so that no rule of one unknown comes in: bh1 is bh2.
    alpha, sigma = VP().alpha, VP().sigma
    times = knots(VP(), 3, "logsnr", None)
    l = VP().log_snr(times)
    h = l[3] - l[2]
    ratios = (l[:2][::-1] - l[2]) / h
    for nodes in (ratios, np.append(ratios, 1.0)):
        weights = []
        for b in (-h, np.expm1(-h)):
            phi, right = np.expm1(-h) / -h - 1, []
            for n in range(1, len(nodes) + 1):
                right.append(phi * math.factorial(n) / b)
                phi = phi / -h - 1 / math.factorial(n + 1)
            rho = np.linalg.solve(np.array([nodes**n for n in range(len(nodes))]), right)
            weights.append(-alpha(times[3]) * b * rho / nodes)
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-12)
        if len(nodes) == 2:
            table = UniPC(3, lower_order_final=False).table(VP(), times, "logsnr")
            np.testing.assert_allclose(table.out[2, 1:3], weights[0], rtol=1e-10)
    assert sigma(times[3]) > 0


def test_v3_is_exact_on_normal_data_with_exact_statistics():
    schedule, means, variances = VP(), np.array([1.0, -0.5]), np.array([0.04, 0.5])
    lam = np.linspace(*schedule.log_snr(np.array([1.0, 1e-3])), 4801)
    # f = -l m, so that its derivative is -l' m, and l = 1 / (1 + e^(2 lam) v).
    l = 1 / (1 + np.exp(2 * lam)[:, None] * variances)
    solver = DPMSolverV3(Statistics(lam, l, 0 * l, 2 * l * (1 - l) * means), 1)
    x, (a, s) = gmm.starts(64), ((f(np.array([1.0, 1e-3]))) for f in (schedule.alpha, schedule.sigma))
    noise = lambda t, x: (
        schedule.sigma(t)
        * (x - schedule.alpha(t) * means)
        / (schedule.alpha(t) ** 2 * variances + schedule.sigma(t) ** 2)
    )
    stretch = np.sqrt((a[1] ** 2 * variances + s[1] ** 2) / (a[0] ** 2 * variances + s[0] ** 2))
    wanted = a[1] * means + stretch * (x - a[0] * means)
    for steps in (1, 2, 5):
        assert gmm.rms(followed(solver, steps, schedule, noise, x), wanted) < 1e-6
    assert gmm.rms(followed(DPMSolverPP(1), 1, schedule, noise, x), wanted) > 0.4
