"""The PyTorch peers of the one problem: a hand loop, the same with a compiled step, torchsde.

PyTorch is optional. Every peer draws its own noise, from the same weights and the same initial state. On a
machine without a JAX accelerator they run on the CPU, once with one thread (whose CPU time is reported, since
idle OpenMP threads burn CPU in barriers) and once with all cores; the better of the two wall times is
reported.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from . import _harness as harness
from . import _problems as problems
from ._harness import Method, Options, Row
from ._problems import Size

INSTALL = "pip install torch==2.13.0 torchsde"


def rows(reference: Method, size: Size, options: Options, *, gradient: bool, save: bool = False) -> list[Row]:
    """One line per peer beside ``reference``; how to install PyTorch where it is missing."""
    if not options.torch:
        return []
    if not installed():
        return [Row("torch peers", note=f"not installed: {INSTALL}")]
    out = []
    for name, make in _peers(size, options, gradient, save):
        out.append(harness.attempt(name, lambda name=name, make=make: _row(reference, name, make, options)))
    return out


def reversible_row(reference: Method, size: Size, options: Options) -> Row:
    """The line of torchsde's reversible Heun and the adjoint that undoes its steps."""
    name = "torchsde reversible_heun, its adjoint"
    if not installed() or importlib.util.find_spec("torchsde") is None:
        return Row(name, note=f"not installed: {INSTALL}")
    make = lambda: _torchsde_call(size, True, False, adjoint=True, method="reversible_heun")
    return harness.attempt(name, lambda: _row(reference, name, make, options))


def installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def agreement(size: Size, increments: np.ndarray, final: np.ndarray) -> float:
    """The largest difference between the torch loop's last state and ``final``, both on the same noise."""
    import torch

    params, y0 = _problem(size, gradient=False)
    noise = torch.from_numpy(np.array(increments)).to(y0.device)
    with torch.no_grad():
        y = _loop(_step(size, params), y0, noise)[-1]
    return float(np.max(np.abs(y.cpu().numpy() - final)))


def _row(reference: Method, name: str, make: Callable[[], Callable], options: Options) -> Row:
    import torch

    cores = os.cpu_count() or 1
    if jax.default_backend() != "cpu":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return harness.row(reference, Method(name, make(), note=f"on {device}"), options)
    results = {}
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            results[threads] = harness.compare(reference, Method(name, make()), options)
    finally:
        torch.set_num_threads(before)
    best = min(results, key=lambda threads: results[threads][0].median)
    wall, _, ms = results[best]
    note = f"wall: {best} thread{'s' if best > 1 else ''}, cpu: 1 thread"
    return Row(name, wall, results[1][1], ms, note=note)


def _peers(size: Size, options: Options, gradient: bool, save: bool) -> Iterator[tuple[str, Callable[[], Callable]]]:
    yield "torch loop", lambda: _loop_call(size, gradient, save, compile_step=False)
    if options.quick:
        return
    yield "torch.compile of its step", lambda: _loop_call(size, gradient, save, compile_step=True)
    if importlib.util.find_spec("torchsde") is None:
        yield "torchsde euler", lambda: _missing()
        return
    yield "torchsde euler", lambda: _torchsde_call(size, gradient, save, adjoint=False)
    if gradient and size.name == "medium" and not save:
        yield "torchsde euler, its adjoint", lambda: _torchsde_call(size, gradient, save, adjoint=True)


def _missing() -> Callable:
    raise ModuleNotFoundError(f"not installed: {INSTALL}")


def _device() -> str:
    import torch

    return "cuda" if jax.default_backend() != "cpu" and torch.cuda.is_available() else "cpu"


def _problem(size: Size, gradient: bool) -> tuple[dict, Any]:
    import torch

    params, y0, _ = problems.make(size)

    def tensor(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x)).to(_device()).requires_grad_(gradient)

    return jax.tree.map(tensor, params), tensor(y0)


def _apply(layers: list[dict], y: Any) -> Any:
    import torch

    for layer in layers[:-1]:
        y = torch.tanh(torch.addmm(layer["bias"], y, layer["weight"]))
    return torch.addmm(layers[-1]["bias"], y, layers[-1]["weight"])


def _step(size: Size, params: dict) -> Callable:
    import torch

    h = size.step_size

    def step(y: Any, dw: Any) -> Any:
        return y + _apply(params["drift"], y) * h + 0.3 * torch.tanh(_apply(params["diffusion"], y)) * dw

    return step


def _loop(step: Callable, y: Any, increments: Any) -> list:
    ys = [y]
    for dw in increments.unbind(0):
        ys.append(step(ys[-1], dw))
    return ys


def _finish(run: Callable[[], Any], params: dict, y0: Any, gradient: bool) -> Callable[[], Any]:
    import torch

    leaves = [*jax.tree.leaves(params), y0]

    def call() -> Any:
        if gradient:
            value = run().pow(2).mean()
            out = (value, torch.autograd.grad(value, leaves))
        else:
            with torch.no_grad():
                out = run().pow(2).mean()
        if y0.is_cuda:
            torch.cuda.synchronize()
        return out

    return call


def _loop_call(size: Size, gradient: bool, save: bool, *, compile_step: bool) -> Callable[[], Any]:
    import torch

    params, y0 = _problem(size, gradient)
    step = _step(size, params)
    if compile_step:
        step = torch.compile(step, dynamic=False)
    shape = (size.steps, size.batch, size.dim)

    def run() -> Any:
        increments = math.sqrt(size.step_size) * torch.randn(shape, device=y0.device)
        ys = _loop(step, y0, increments)
        return torch.stack(ys) if save else ys[-1]

    return _finish(run, params, y0, gradient)


def _torchsde_call(
    size: Size, gradient: bool, save: bool, *, adjoint: bool, method: str = "euler"
) -> Callable[[], Any]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchsde

    params, y0 = _problem(size, gradient)

    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito" if method == "euler" else "stratonovich"

        def __init__(self) -> None:
            super().__init__()
            # the leaves are registered so that torchsde's adjoint finds them
            self.tree = jax.tree.map(torch.nn.Parameter, params)
            self.leaves = torch.nn.ParameterList(jax.tree.leaves(self.tree))

        def f(self, t: Any, y: Any) -> Any:
            return _apply(self.tree["drift"], y)

        def g(self, t: Any, y: Any) -> Any:
            return 0.3 * torch.tanh(_apply(self.tree["diffusion"], y))

    equation = Equation()
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    extra = {"adjoint_method": "adjoint_reversible_heun"} if method == "reversible_heun" else {}
    ts = torch.linspace(0.0, 1.0, size.steps + 1 if save else 2, device=y0.device)

    def run() -> Any:
        # told the step, its Brownian motion is more than twice as fast as the one it makes by itself
        path = torchsde.BrownianInterval(
            t0=ts[0], t1=ts[-1], size=tuple(y0.shape), dtype=y0.dtype, device=y0.device, dt=size.step_size
        )
        ys = solve(equation, y0, ts, bm=path, method=method, dt=size.step_size, **extra)
        return ys if save else ys[-1]

    return _finish(run, equation.tree, y0, gradient)
