"""On meshes with explicit axes and within ``jax.shard_map``: the values and gradients of one device.

A mesh of one device has all the types that make loops fail; the slow test takes four.
"""

import os
import subprocess
import sys

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sdeflow as sf

SPLIT, TS = PartitionSpec("i"), np.array([0.0, 0.5, 1.0])
NET = eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(1))
PID = dfx.PIDController(rtol=1e-3, atol=1e-5)


def _field(rate):
    # Closes over what may be traced, and over a network.
    return sf.ODE(lambda t, y, args: -rate * y + 0.1 * NET(y))


def _ou(rate):
    return sf.equations.OrnsteinUhlenbeck(rate * jnp.eye(3), 0.2, 0.5)


JOBS = {
    "implicit": lambda x, a, key: sf.solve(_field(a), x, TS, dt0=0.5, solver=dfx.Kvaerno3()).ys,
    "adaptive": lambda x, a, key: sf.solve(_field(a), x, TS, solver=dfx.Tsit5(), stepsize_controller=PID).ys,
    "exact": lambda x, a, key: sf.solve(_ou(a), x, TS, key=key).ys,
    "log_prob": lambda x, a, key: _ou(a).log_prob(TS, jnp.outer(TS + a, x), obs_std=0.1)[None],
    "sinkhorn": lambda x, a, key: sf.metrics.sinkhorn_divergence(x[:, None] * a, x[:, None] ** 2, epsilon=0.5)[None],
}
MORE = {
    "walk": lambda x, a, key: sf.solve(_field(a), x, TS, dt0=0.25).ys,
    "reversible": lambda x, a, key: sf.solve(
        _ou(a), x, TS, dt0=0.25, key=key, solver=dfx.ReversibleHeun(), adjoint=sf.adjoints.ReversibleAdjoint()
    ).ys,
    "continuous": lambda x, a, key: sf.solve(
        _ou(a), x, TS, dt0=0.25, key=key, adjoint=sf.adjoints.ContinuousAdjoint()
    ).ys,
    "interpolating": lambda x, a, key: sf.solve(
        _field(a), x, TS, dt0=0.25, adjoint=sf.adjoints.InterpolatingAdjoint()
    ).ys,
    "of time": lambda x, a, key: sf.equations.OrnsteinUhlenbeck(lambda t: a * (1 + t), 0.0, x).transition(0.0, 1.0)[2],
    "distances": lambda x, a, key: sf.metrics.mmd(x[:, None] * a, x[:, None] ** 2)[None],
    "bridge": lambda x, a, key: sf.bridges.gaussian_sb(x, jnp.eye(3), x + 1, jnp.eye(3), _ou(a)).drift(0.3, x),
    "light": lambda x, a, key: sf.bridges.light_sb(
        *jax.random.normal(key, (2, 16, 3)), epsilon=0.5, num_components=2, steps=20, batch_size=8, key=key
    ).drift(0.5, x * a),
}  # fmt: skip


def check(job, devices, modes=("varying", "unchecked", "explicit", "context")):
    """Values and gradients of a batch, on a mesh, against those without one."""
    n = 4
    x, keys = jnp.linspace(0.5, 1.5, 3 * n).reshape(n, 3), jax.random.split(jax.random.key(0), n)

    def total(x, rate, keys):
        values = jax.vmap(lambda x, key: job(x, rate, key))(x, keys)
        return values.sum(), values

    def both(x, rate, keys):
        (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(x, rate, keys)
        return values, *grads

    rate = jnp.float32(1.3)
    want = jax.jit(both)(x, rate, keys)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    for mode in modes:
        if mode in ("varying", "unchecked"):
            # The rate is shared: its gradient is a sum over devices.
            specs = {"in_specs": (SPLIT, PartitionSpec(), SPLIT), "check_vma": mode == "varying"}
            mesh = Mesh(np.array(devices), ("i",))
            values = jax.shard_map(lambda *z: total(*z)[1], mesh=mesh, out_specs=SPLIT, **specs)
            found = jax.jit(jax.value_and_grad(lambda *z: values(*z).sum(), (0, 1)))(x, rate, keys)[1]
            jax.tree.map(close, found, want[1:])
            if mode == "varying":
                inside = jax.shard_map(both, mesh=mesh, out_specs=(SPLIT, SPLIT, PartitionSpec()), **specs)
                jax.tree.map(close, jax.jit(inside)(x, rate, keys), want)
            continue
        mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(AxisType.Explicit,), devices=devices)
        spread = [jax.device_put(z, NamedSharding(mesh, SPLIT)) for z in (x, keys)]
        if mode == "context":
            with jax.set_mesh(mesh):
                found = jax.jit(both)(spread[0], rate, spread[1])
        else:
            found = jax.jit(both)(spread[0], rate, spread[1])
        jax.tree.map(close, found, want)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("implicit", "context"),
        ("implicit", "unchecked"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("adaptive", "varying"), ("log_prob", "varying"))),
    ],
)
def test_a_mesh_changes_no_number(name, mode):
    check(JOBS[name], jax.devices()[:1], (mode,))


FOUR = """
import jax, test_mesh as t
assert jax.device_count() == 4
for i, (name, job) in enumerate((t.JOBS | t.MORE).items()):
    # A mode each, in turn: all together take minutes.
    t.check(job, jax.devices(), (("unchecked", "explicit") if i % 2 else ("context",)))
    print(name, flush=True)
"""


@pytest.mark.slow
def test_four_devices_find_what_one_does(tmp_path):
    here = os.path.dirname(__file__)
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]),
    }
    done = subprocess.run([sys.executable, "-c", FOUR], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == list(JOBS | MORE)


def test_functions_that_close_over_arrays_are_opened_and_closed_again():
    from functools import partial

    from sdeflow._mesh import _closed, _opened

    scale, shift = jnp.array(2.0), jnp.array(1.0)
    inner = lambda x: scale * x
    outer = partial(lambda s, x, *, power=2: inner(x) ** power + s, shift)
    tree = {"f": outer, "g": jnp.sin, "x": jnp.ones(2)}
    opened = _opened(tree)
    assert len(jax.tree.leaves(eqx.filter(opened, eqx.is_array))) == 3
    doubled = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, opened)
    assert float(_closed(doubled)["f"](1.0)) == 4.0**2 + 2.0
    assert _closed(opened)["g"] is jnp.sin
