"""Claim: fractional noise that can be learned at any spacing, and steps that are right where explicit ones are not.

Hurst index. Exact fractional Brownian motion (Davies-Harte in float64) on [0, 1] at 256 equal steps, 24 paths for each
H. The index is found by maximising a likelihood over H, the scale of the noise known or free: our default noise with
the spacing given, the rates of Daems et al. (ICLR 2024), and the exact likelihood of fractional Gaussian noise. The
figure is the mean over paths, what is asked of it, and in the note its standard deviation.

Strong error. Type II, five factors geometric from .05 to the fastest rate, horizon 1, 400 paths:
dX = -X dt + .5 X o dB with the solution exp(-t + .5 B(t)), and dX = (X - X^3) dt + .5 dB against steps of an eighth on
the same path. Root mean square at time 1, h = 1/64, for `ExponentialHeun`, and for explicit steps of the ordinary
equation for X and the factors (Ito-corrected Euler), which sdeflow refuses and which are written by hand here.

Inference: see `_fractional_bridge`.

Speed. 4096 paths of 256 steps, six factors: `solve` beside a hand-written scan of the same recursion that draws the
same number of normals with jax.random.normal. Exact fractional Brownian motion, 256 paths of 1024 steps, beside the
packages fbm 0.3.0 and stochastic 0.6.0 where they are installed (``pip install --no-deps fbm stochastic``), and beside
the second what the normals alone take, which no method that draws them can go below.
"""

import dataclasses
import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf
from sdeflow.equations import FractionalSDE
from sdeflow.paths._factor_brownian import joint_factor
from sdeflow.paths._grid_brownian import normals

from . import _harness as harness
from ._fractional_bridge import control, past, series
from ._harness import Claim, Method, Options, Row, Spread, line

N, REPLICATIONS = 256, 24
HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)
OFFICIAL = tuple(np.geomspace(1 / 20, 20, 5))
#: theoretical deviation of the exact estimate with a free scale, n = 256
SPREAD = {0.1: 0.02, 0.3: 0.037, 0.5: 0.041, 0.7: 0.033, 0.9: 0.037}


def golden(value: Any, low: float = 0.03, high: float = 0.97) -> Any:
    """Where a function of one number is largest."""
    ratio = (5**0.5 - 1) / 2

    def narrow(_: Any, ends: Any) -> Any:
        a, b = ends
        left, right = b - ratio * (b - a), a + ratio * (b - a)
        lower = value(left) > value(right)
        return jnp.where(lower, a, left), jnp.where(lower, right, b)

    a, b = jax.lax.fori_loop(0, 16, narrow, (jnp.asarray(low), jnp.asarray(high)))
    return (a + b) / 2


def by_factors(xs: Any, free: bool, **rates: Any) -> Any:
    """The index of one path by the likelihood of few factors."""
    ts = jnp.arange(1, N + 1) / N

    def value(hurst: Any) -> Any:
        noise = sf.paths.MarkovFractionalNoise(hurst, 1.0, **rates)
        known = noise.log_prob(ts, xs)
        if not free:
            return known
        # The density of the path times zero holds the determinant alone; the best scale then has a closed form.
        size = noise.log_prob(ts, 0 * xs)
        return size - N / 2 * jnp.log(2 * (size - known))

    return golden(value)


def recovery(options: Options) -> Claim:
    """The table of Hurst indices."""
    out = []
    # Compiled once each: the index of the data is an argument.
    draw = jax.jit(
        lambda h, key: sf.paths.FractionalBrownian(np.arange(N + 1) / N, (REPLICATIONS,), key=key, hurst=h).values[1:]
    )
    every = {
        "ours, known scale": functools.partial(by_factors, free=False, spacing=1 / N),
        "ours, free scale": functools.partial(by_factors, free=True, spacing=1 / N),
        "official rates, known scale": functools.partial(by_factors, free=False, rates=OFFICIAL),
        "official rates, free scale": functools.partial(by_factors, free=True, rates=OFFICIAL),
        "exact": lambda xs: sf.paths.estimate_hurst(jnp.concatenate([jnp.zeros(1), xs])),
        "Whittle": lambda xs: sf.paths.estimate_hurst(jnp.concatenate([jnp.zeros(1), xs]), method="whittle"),
    }
    with jax.enable_x64(True):
        for name, estimate in every.items():
            run = jax.jit(jax.vmap(estimate, in_axes=1))
            for i, hurst in enumerate(HURSTS):
                found = np.asarray(run(draw(hurst, jax.random.fold_in(jax.random.key(2026), i))))
                asked = (0.0, 0.0)
                if name.startswith("ours") and hurst > 0.2:
                    asked = (hurst - 0.03, hurst + 0.03)
                if name == "exact":
                    slack = 3 * SPREAD[hurst] / REPLICATIONS**0.5
                    asked = (hurst - slack, hurst + slack)
                out.append(line(f"{name}, H = {hurst}", float(found.mean()), asked, f"sd {found.std():.3f}"))
    setting = f"{REPLICATIONS} paths of {N} steps on [0, 1]"
    return Claim("fractional", "the Hurst index of exact fractional Brownian motion", setting, "the figures", out)


def explicit_euler(noise: Any, path: Any, h: float, additive: bool) -> Any:
    """X at time 1 by explicit steps for X and the factors."""
    w, rates = noise.coefficients(), jnp.asarray(noise.rates)
    whole = w.sum()

    def step(carry: Any, dw: Any) -> Any:
        x, y = carry
        g = 0.5 if additive else 0.5 * x
        drift = x - x**3 if additive else -x + 0.5 * 0.25 * whole**2 * x
        return (x + (drift - g * (w * rates) @ y) * h + g * whole * dw, y - rates * y * h + dw), None

    return jax.lax.scan(step, (jnp.ones(()), jnp.zeros_like(w)), path.table.W)[0][0]


def strong(options: Options) -> Claim:
    """The table of strong errors."""
    #: hurst, fastest rate -> the errors of the exponential method that were measured for the design
    known = {(0.3, 20.0): (7.0e-3, 1.1e-2), (0.3, 200.0): (9.9e-3, 1.6e-2), (0.3, 800.0): (np.inf, np.inf),
             (0.7, 20.0): (8.5e-4, 1.5e-4), (0.7, 200.0): (6.2e-4, 1.5e-4), (0.7, 800.0): (np.inf, np.inf)}  # fmt: skip
    out = []
    grid, keys = sf.grids.uniform(0.0, 1.0, 512), jax.random.split(jax.random.key(0), 400)
    with jax.enable_x64(True):
        for (hurst, fastest), marks in known.items():
            noise = sf.paths.MarkovFractionalNoise(
                hurst, 1.0, kind="II", rates=np.geomspace(0.05, fastest, 5), normalise=False
            )
            for additive, mark in zip((True, False), marks):
                drift = (lambda t, x, a: x - x**3) if additive else (lambda t, x, a: -x)
                spread = (lambda t, x, a: jnp.full_like(x, 0.5)) if additive else (lambda t, x, a: 0.5 * x)
                sde = FractionalSDE(drift, spread, noise, additive=additive)

                def both(key: Any, sde: Any = sde, noise: Any = noise, additive: bool = additive) -> Any:
                    fine = noise.path(grid, (), key=key)
                    path = fine.coarsen(8)
                    run = lambda path: sf.solve(sde, jnp.ones(()), [0.0, 1.0], path=path).final
                    final = run(path)
                    truth = run(fine).x if additive else jnp.exp(-1 + 0.5 * noise.coefficients() @ final.factors)
                    return final.x - truth, explicit_euler(noise, path, 1 / 64, additive) - truth

                errors = [np.asarray(e) for e in jax.jit(jax.vmap(both))(keys)]
                kind = "additive" if additive else "multiplicative"
                where = f"{kind}, H = {hurst}, rate h = {fastest / 64:.3g}"
                with np.errstate(all="ignore"):
                    ours, other = (float(np.sqrt(np.mean(e**2))) for e in errors)
                finite = int(np.isfinite(errors[0]).sum())
                note = f"{ours:.2e}; {finite} of 400 paths finite; explicit Euler {other:.2g}"
                # At rates for which no figure is known, that every path is finite and near.
                asked = 1.4 * mark if np.isfinite(mark) else 0.1
                more = {"1000 x error": Spread.of([1e3 * ours])}
                out.append(Row(where, note=note, more=more, target=1e3 * asked, judged=("1000 x error",)))
    return Claim("fractional", "strong error", "400 paths, h = 1/64", "the figures", out)


def speed(options: Options) -> list[Claim]:
    """A solve beside a scan written by hand."""
    steps, paths = 256, 512 if options.quick else 4096
    noise = sf.paths.MarkovFractionalNoise(0.3, 1.0, kind="II")
    sde = FractionalSDE(lambda t, x, a: -x, lambda t, x, a: 0.5 * x, noise)
    rates, w, h = jnp.asarray(noise.rates, jnp.float32), noise.coefficients(), 1 / steps

    def ours(keys: Any, x0: Any) -> Any:
        return jax.vmap(lambda key: sf.solve(sde, x0, [0.0, 1.0], dt0=h, key=key).ys[-1])(keys)

    def batch(key: Any, x0: Any) -> Any:
        return sf.solve(sde, jnp.broadcast_to(x0, (paths,)), [0.0, 1.0], dt0=h, key=key).ys[-1]

    L = np.asarray(joint_factor(tuple(noise.rates), jnp.asarray(h))) * h**0.5

    def scan(key: Any, x0: Any) -> Any:
        z = jax.random.normal(key, (steps, 6, paths))
        moved = jnp.expm1(-rates * h)[:, None]

        def step(carry: Any, z: Any) -> Any:
            x, y = carry
            change = moved * y + jnp.asarray(L) @ z
            dB = (w[:, None] * change).sum(axis=0)
            euler = x - x * h + 0.5 * x * dB
            return (x - (x + euler) * h / 2 + 0.25 * (x + euler) * dB, y + change), None

        return jax.lax.scan(step, (jnp.broadcast_to(x0, (paths,)), jnp.zeros((6, paths))), z)[0][0]

    key, keys, x0 = jax.random.key(0), jax.random.split(jax.random.key(0), paths), jnp.ones(())
    reference = harness.compiled("scan by hand", scan, (key, x0))
    rows = []
    for name, fn, args, target in (
        ("solve, one batched state", batch, (key, x0), 1.3),
        ("solve, vmap over keys", ours, (keys, x0), None),
    ):
        make = lambda name=name, fn=fn, args=args, target=target: harness.row(
            reference, harness.compiled(name, fn, args), options, target
        )
        rows.append(harness.attempt(name, make, target))
    floor = harness.row(reference, harness.compiled("scan by hand", scan, (key, x0)), options)
    setting = f"{paths} paths, {steps} steps, K = 6, float32"
    claims = [Claim("fractional", "speed of a solve", setting, "a scan by hand", rows, floor=floor)]

    draw = lambda key: sf.paths.FractionalBrownian(np.arange(1025) / 1024, (256,), key=key, hurst=0.7).values
    exact = harness.compiled("sdeflow", draw, (key,))
    half = (jax.ShapeDtypeStruct((128, 2048), jnp.float32),) * 2
    own = harness.compiled("our normals", lambda key: normals(key, half, diffrax.BrownianIncrement), (key,))
    plain = harness.compiled("jax.random.normal", lambda key: jax.random.normal(key, (256, 2048)), (key,))
    peers = []
    for name, make in (("fbm", _fbm), ("stochastic", _stochastic)):
        call = make()
        if call is None:
            peers.append(Row(name, note=f"not installed: pip install --no-deps {name}"))
            continue
        # The other way round, so that a bound from above asks for ten times the speed.
        peers.append(_named(harness.row(Method(name, call), exact, options, 0.1), name))
        if name == "stochastic":
            # What the 2 x 1024 normals of a path cost, whatever is made of them.
            peers += [_named(harness.row(Method(name, call), m, options), name, m.name) for m in (own, plain)]
    relative = "the package named: ours as a share of its time"
    return [*claims, Claim("fractional", "exact paths", "256 paths of 1024 steps, H = .7", relative, peers)]


def _named(row: Row, peer: str, ours: str = "sdeflow") -> Row:
    return row if row.wall is None else dataclasses.replace(row, method=f"{ours} / {peer}")


def _fbm() -> Any:
    try:
        import fbm
    except ImportError:
        return None
    generator = fbm.FBM(n=1024, hurst=0.7, length=1, method="daviesharte")
    return lambda: [generator.fbm() for _ in range(256)]


def _stochastic() -> Any:
    try:
        from stochastic.processes.continuous import FractionalBrownianMotion
    except ImportError:
        return None
    generator = FractionalBrownianMotion(hurst=0.7, t=1)
    return lambda: [generator.sample(1024) for _ in range(256)]


def run(options: Options) -> list[Claim]:
    """All of them."""
    return [recovery(options), strong(options), past(options), control(options), series(options), *speed(options)]
