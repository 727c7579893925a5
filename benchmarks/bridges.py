"""Claim: Schrödinger bridges as accurate as plain PyTorch's, in less time, on plans that are known.

Pairs with a known plan. p0 = N(0, 1), a potential of five Gaussians with rotated covariances (eigenvalues .3 to 1,
means at distance 3), hence a plan in closed form; X and Y of the training pool are drawn independently. `light_sb`,
with 50 components and its defaults, which for 10 000 updates of 128 rows see as many rows at most, against the same
objective in PyTorch with the official settings (Adam at 1e-3 for epsilon .1 and 3e-3 for 1, S = 1 at first, rows drawn
with torch.randint). The figure is cBW2-UVP in percent, from exact moments of both plans at 200 starts, so it has no
sampling floor. CPU time is of the training loop, for ours with compiling.

Gaussians. p0 = N(.1, 1), p1 = N(-.1, 1) and sigma = 1 in 5, 20 and 50 dimensions (the setting of DSBM): the covariance
of the two ends is (sqrt(5) - 1) / 2 = .618 in every dimension.

MSCI. Cells of days 2, 3, 4 and 7 in 50 components (not shipped: skipped where they are not): days 2 -> 4 judged on 3
and 3 -> 7 judged on 4, by the energy distance in the data's units.

Left out. Every interior day of two sets (not shipped: skipped where they are not) is predicted from the others, on five
subsamples of n cells a day: human embryonic stem cells at their hours, and the first five whitened components of the
same days 2, 3, 4 and 7, at times 0, 1, 2 and 3 as the protocol has them and again at the days themselves. The figures
are W1 and W2, means over the days left out, and 95% intervals of the paired differences between `interpolate` and the
transport midpoint, over subsamples. The constants of `interpolate`, and that it bends with four snapshots or more, were
chosen by the ratio to that midpoint over simulated cells, two simulated networks, and subsamples of both sets with
other keys than the one reported; the page on bridges says how.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from ._harness import Claim, Options, Row, Spread, line
from ._torch_peers import INSTALL, installed

POOL, STEPS, BATCH, K = 100_000, 10_000, 128, 50
CELLS = [(2, 0.1), (2, 1.0), (16, 0.1), (16, 1.0), (64, 0.1), (64, 1.0)]
#: the key of the subsamples of days left out: nothing was chosen on them
REPORTED = 2026
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan sum_k w_k(x) N(r_k + S_k x, epsilon S_k) with log w_k = c_k + (x' S_k x + 2 r_k' x) / 2 epsilon."""

    constants: np.ndarray
    centres: np.ndarray
    spreads: np.ndarray
    epsilon: float

    def moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact means and covariances of y given each x."""
        w, means = self._weights(x), self._means(x)
        mean = np.einsum("nk,nkd->nd", w, means)
        gap = means - mean[:, None]
        within = self.epsilon * np.einsum("nk,kde->nde", w, self.spreads)
        return mean, within + np.einsum("nk,nkd,nke->nde", w, gap, gap)

    def draw(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One y for each x."""
        which = (self._weights(x).cumsum(axis=1) > rng.random((len(x), 1))).argmax(axis=1)
        roots = np.linalg.cholesky(self.epsilon * self.spreads)
        out = rng.standard_normal(x.shape)
        for k in range(len(self.constants)):
            rows = which == k
            out[rows] = self.centres[k] + x[rows] @ self.spreads[k] + out[rows] @ roots[k].T
        return out

    def _means(self, x: np.ndarray) -> np.ndarray:
        return self.centres + np.einsum("kde,ne->nkd", self.spreads, x)

    def _weights(self, x: np.ndarray) -> np.ndarray:
        quadratic = np.einsum("nd,kde,ne->nk", x, self.spreads, x, optimize=True)
        logits = self.constants + (quadratic + 2 * x @ self.centres.T) / (2 * self.epsilon)
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        return w / w.sum(axis=1, keepdims=True)


def truth(dim: int, epsilon: float) -> Plan:
    """The known plan: five Gaussians with respect to the kernel exp(-|x - y|^2 / 2 epsilon)."""
    rng = np.random.default_rng(1000 * dim + round(100 * epsilon))
    mu = rng.standard_normal((5, dim))
    mu = 3 * mu / np.linalg.norm(mu, axis=1, keepdims=True)
    eigenvalues = rng.uniform(0.3, 1, (5, dim))
    turns = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(5)]
    sigma = np.stack([q @ np.diag(l) @ q.T for q, l in zip(turns, eigenvalues)])
    wide = sigma + epsilon * np.eye(dim)
    pull = np.linalg.solve(wide, mu[..., None])[..., 0]
    constants = -np.linalg.slogdet(wide)[1] / 2 - (mu * pull).sum(axis=1) / 2
    # epsilon S = (1 / epsilon + 1 / sigma)^-1 = epsilon sigma / (sigma + epsilon); r = epsilon mu / (sigma + epsilon).
    spreads = np.linalg.solve(wide, sigma)
    return Plan(constants, epsilon * pull, (spreads + spreads.transpose(0, 2, 1)) / 2, epsilon)


def error(plan: Plan, exact: Plan, dim: int) -> float:
    """CBW2-UVP of a plan in percent."""
    x = np.random.default_rng(7).standard_normal((200, dim))
    y = exact.draw(np.random.default_rng(8).standard_normal((50_000, dim)), np.random.default_rng(9))
    return sf.metrics.cbw2_uvp(plan.moments(x), exact.moments(x), variance=float(y.var(axis=0).sum()))


def ours(x: np.ndarray, y: np.ndarray, epsilon: float, seed: int) -> tuple[Plan, float]:
    """The plan that `light_sb` learns, and the CPU seconds that it takes."""
    began = time.process_time()
    bridge = sf.bridges.light_sb(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y, jnp.float32),
        epsilon=epsilon,
        num_components=K,
        steps=STEPS,
        batch_size=BATCH,
        key=jax.random.key(seed),
    )
    jax.block_until_ready(bridge.potential)
    seconds = time.process_time() - began
    p, shift = bridge.potential, np.asarray(bridge.clock.shift, np.float64)
    spreads, centres = np.asarray(p.covariances(), np.float64), np.asarray(p.centres, np.float64)
    # Back from clouds around the shift m to where they were: r + m - S m, and the constants that keep the weights.
    moved = centres + shift - spreads @ shift
    constants = np.asarray(p.log_weights, np.float64) + (
        np.einsum("d,kde,e->k", shift, spreads, shift) - 2 * centres @ shift
    ) / (2 * epsilon)
    return Plan(constants, moved, spreads, epsilon), seconds


def plain_torch(x: np.ndarray, y: np.ndarray, epsilon: float, seed: int) -> tuple[Plan, float]:
    """The same objective in PyTorch on one thread, official settings."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = [torch.tensor(v, dtype=torch.float32) for v in (x, y)]
    centres = data[1][torch.randperm(len(y))[:K]].clone().requires_grad_()
    logs = torch.zeros_like(centres).detach().requires_grad_()
    weights = torch.full((K,), epsilon * float(np.log(1 / K)), requires_grad=True)
    optim = torch.optim.Adam([weights, centres, logs], lr=1e-3 if epsilon < 0.5 else 3e-3)
    began = time.process_time()
    for _ in range(STEPS):
        a, b = (v[torch.randint(len(v), (BATCH,))] for v in data)
        spread, log_a = logs.exp(), weights / epsilon
        c = log_a + (a**2 @ spread.T / 2 + a @ centres.T) / epsilon
        gap = b[:, None] - centres
        v = log_a - logs.sum(dim=1) / 2 - (gap**2 / spread).sum(dim=-1) / (2 * epsilon)
        loss = c.logsumexp(dim=1).mean() - v.logsumexp(dim=1).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    seconds = time.process_time() - began
    arrays = [v.detach().numpy().astype(np.float64) for v in (weights / epsilon, centres, logs.exp())]
    return Plan(arrays[0], arrays[1], np.stack([np.diag(s) for s in arrays[2]]), epsilon), seconds


def pairs(options: Options) -> Claim:
    """Known plans, ours beside PyTorch."""
    seeds, out = range(3), []
    for dim, epsilon in CELLS:
        exact, found = truth(dim, epsilon), {"sdeflow": [], "PyTorch": []}
        methods = {"sdeflow": ours} | ({"PyTorch": plain_torch} if options.torch and installed() else {})
        for seed in seeds:
            rng = np.random.default_rng(seed)
            x = rng.standard_normal((POOL, dim))
            y = exact.draw(rng.standard_normal((POOL, dim)), rng)
            for name, method in methods.items():
                plan, seconds = method(x, y, epsilon, seed)
                found[name].append((error(plan, exact, dim), seconds))
        for name in methods:
            errors, seconds = zip(*found[name])
            out.append(
                Row(
                    f"D {dim}, epsilon {epsilon:g}, {name}",
                    more={"cBW2-UVP %": Spread.of(errors), "CPU s": Spread.of(seconds)},
                )
            )
        if found["PyTorch"]:
            ratio = [
                statistics.median(v[k] for v in found["sdeflow"]) / statistics.median(v[k] for v in found["PyTorch"])
                for k in (0, 1)
            ]
            marks = (1.0, 0.5) if dim == 2 else (0.5, 1.0)
            for k, what in enumerate(("error", "CPU time")):
                out.append(line(f"D {dim}, epsilon {epsilon:g}, {what}: sdeflow / PyTorch", ratio[k], (0.0, marks[k])))
        else:
            out.append(Row("PyTorch", note=f"not installed: {INSTALL}"))
    return Claim(
        "bridges", "plans that are known", f"3 seeds, K = {K}, {STEPS} updates of {BATCH} rows", "the figures", out
    )


def gaussians() -> Claim:
    """The setting of DSBM."""
    out = []
    for dim in (5, 20, 50):
        rng = np.random.default_rng(dim)
        x0, x1 = 0.1 + rng.standard_normal((10_000, dim)), -0.1 + rng.standard_normal((10_000, dim))
        one, eye = jnp.ones(dim), jnp.eye(dim)
        bridges: dict[str, Any] = {
            "Gaussian": sf.bridges.gaussian_sb(0.1 * one, eye, -0.1 * one, eye, sf.equations.BrownianMotion(dim)),
            "light, one component": sf.bridges.light_sb(
                x0, x1, epsilon=1.0, num_components=1, steps=5000, key=jax.random.key(0)
            ),
            "Sinkhorn": sf.bridges.sinkhorn_bridge(x0[:5000], x1[:5000], 1.0),
        }
        for name, bridge in bridges.items():
            starts = jnp.asarray(x0[:5000], jnp.float32)
            ends = jax.jit(jax.vmap(lambda x, key, b=bridge: b.sample_endpoint(x, key=key)))(
                starts, jax.random.split(jax.random.key(1), len(starts))
            )
            a, b = np.asarray(starts, np.float64), np.asarray(ends, np.float64)
            covariance = ((a - a.mean(axis=0)) * (b - b.mean(axis=0))).mean()
            out.append(
                line(
                    f"D {dim}, {name}",
                    float(covariance),
                    (0.598, 0.638),
                    f"mean {b.mean():.3f}, variance {b.var(axis=0).mean():.3f}",
                )
            )
    return Claim(
        "bridges", "Gaussians: covariance of the two ends", "truth .618, mean -.1, variance 1", "the figures", out
    )


def msci(options: Options) -> Claim:
    """Cells of a day that training did not see."""
    paths = {day: DATA / f"cite_pca50_day{day}.npy" for day in (2, 3, 4, 7)}
    title, setting = (
        "MSCI: energy distance to a day held out, 50 components",
        "5 seeds, K = 10, epsilon .1, 10 000 updates",
    )
    if not all(p.exists() for p in paths.values()):
        return Claim("bridges", title, setting, "the figures", [Row("data", note="not here: skipped")])
    days = {day: np.load(p, allow_pickle=False) for day, p in paths.items()}
    out, both = [], []
    for setup in sf.data.msci_setups(days):
        row, mean = day_held_out(setup)
        out.append(row)
        both.append(mean)
    out.append(line("mean of both", statistics.mean(both), (0.0, 2.36)))
    return Claim("bridges", title, setting, "the figures", out)


def day_held_out(setup: sf.data.HeldOut) -> tuple[Row, float]:
    """One setup of the two, and the mean of its distances."""
    (t0, x0), (t1, x1) = setup.train.pairs()[0]
    t = setup.fraction
    ts = jnp.array([t], jnp.float32)
    cells = np.asarray(setup.train.unstandardise(setup.cells), np.float32)

    def distance(x: np.ndarray) -> float:
        return float(sf.metrics.energy_distance(np.asarray(setup.train.unstandardise(x), np.float32), cells))

    scores, independent = [], []
    for seed in range(5):
        key = jax.random.key(seed)
        bridge = sf.bridges.light_sb(x0, x1, epsilon=0.1, num_components=10, steps=STEPS, key=key)
        keys = jax.random.split(jax.random.key(100 + seed), len(x0))
        path = eqx.filter_jit(lambda b, x, k: jax.vmap(lambda x, k: b.sample_path(x, ts, key=k)[0])(x, k))
        scores.append(distance(np.asarray(path(bridge, jnp.asarray(x0), keys))))
        rng = np.random.default_rng(seed)
        noise = np.sqrt(0.1 * t * (1 - t)) * rng.standard_normal(x0.shape)
        independent.append(distance((1 - t) * x0 + t * x1[rng.integers(len(x1), size=len(x0))] + noise))
    copies, other = (distance(x0), distance(x1)), statistics.mean(independent)
    note = f"copy start {copies[0]:.3f}, copy end {copies[1]:.3f}, independent {other:.3f}"
    name = f"days {t0:g} -> {t1:g}, day {setup.time:g}"
    return Row(name, note=note, more={"value": Spread.of(scores)}), statistics.mean(scores)


def left_out(options: Options) -> Claim:
    """Every interior day predicted from the others, beside guesses that take no method."""
    title, out = "left out: W1 and W2 to each interior day, five components", []
    setting, files = "5 subsamples, n cells a day, in units of one standard deviation", ["hesc.npz"]
    files += [f"cite_pca50_day{day}.npy" for day in (2, 3, 4, 7)]
    if not all((DATA / name).exists() for name in files):
        return Claim("bridges", title, setting, "the figures", [Row("data", note="not here: skipped")])
    stem = np.load(DATA / files[0], allow_pickle=False)
    days = [np.load(DATA / name, allow_pickle=False)[:, :5] for name in files[1:]]
    stem_cells = sf.data.Snapshots([0, 12, 24, 36, 72], [stem[f"t{i}"] for i in range(5)])
    # Four fifths of the smallest day: 66 cells.
    sets = {"hESC, hours": (stem_cells, 52)}
    size = 300 if options.quick else 1000
    sets |= {
        f"Cite, {name}": (sf.data.Snapshots(times, days), size)
        for name, times in (("times 0 to 3", range(4)), ("days 2 to 7", (2, 3, 4, 7)))
    }
    ours = functools.partial(sf.bridges.interpolate, key=jax.random.key(2))
    for name, (cells, n) in sets.items():
        bent = len(cells) - 1 >= 4
        methods = {
            "copy previous": sf.bridges.copy_previous,
            "copy next": sf.bridges.copy_next,
            "independent midpoint": functools.partial(sf.bridges.independent_midpoint, key=jax.random.key(1)),
            "transport midpoint": sf.bridges.transport_midpoint,
            "interpolate": ours,
            "interpolate, in step": functools.partial(ours, asynchrony=0.0),
            f"interpolate, {'straight' if bent else 'bent'}": functools.partial(ours, curvature=not bent),
        }
        scores = sf.bridges.score_left_out(cells.standardise(), methods, n=n, key=jax.random.key(REPORTED))
        means = {method: x.mean(axis=1) for method, x in scores.items()}
        for method, x in means.items():
            more = {"W1": Spread.of(x[:, 0].tolist()), "W2": Spread.of(x[:, 1].tolist())}
            note = "means " + ", ".join(f"{v:.3f}" for v in x.mean(axis=0))
            note += "; W1 day by day " + ", ".join(f"{v:.3f}" for v in scores[method][..., 0].mean(axis=0))
            out.append(Row(f"{name}, n {n}, {method}", note=note, more=more))
        for k, what in enumerate(("W1", "W2")):
            gap = sf.metrics.paired_difference(means["interpolate"][:, k], means["transport midpoint"][:, k])
            note = f"mean {gap}" + ("" if gap.decided else ", a tie")
            label = f"{name}, {what}, interpolate - transport midpoint: upper end"
            out.append(line(label, gap.high, (-np.inf, 0.0), note))
    return Claim("bridges", title, setting, "the figures", out)


def run(options: Options) -> list[Claim]:
    """All four."""
    return [gaussians(), msci(options), left_out(options), pairs(options)]
