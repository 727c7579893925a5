"""The samplers by their names: each is a choice of `Multistep` or `Singlestep`."""

from typing import Literal

from ._multistep import Multistep, check_order
from ._singlestep import Singlestep


def DDIM(eta: float = 0.0) -> Multistep:  # noqa: N802
    """Song, Meng and Ermon's sampler (ICLR 2021): order 1.

    Arguments:
        eta: how much noise is added; 0 for none, 1 for that of the reverse equation.

    Raises:
        ValueError: for an eta that does not lie between 0 and 1.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DDIM().order
        1
    """
    return Multistep(1, "data", eta=eta)


def DEIS(  # noqa: N802
    order: int = 3, coordinate: Literal["t", "rho"] = "t", *, lower_order_final: bool | None = False
) -> Multistep:
    """Zhang and Chen's sampler (ICLR 2023): a polynomial through the last noises, in t or in rho = sigma / alpha.

    Arguments:
        order: how many outputs are combined; what the paper calls tAB-k combines k + 1.
        coordinate: "t" or "rho".
        lower_order_final: whether the last steps combine fewer.

    Raises:
        ValueError: for another order or coordinate.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DEIS(2, "rho")
        Multistep(order=2, reads='noise', coordinate='rho', lower_order_final=False)
    """
    if coordinate not in ("t", "rho"):
        raise ValueError(f'coordinate must be "t" or "rho", got {coordinate!r}.')
    return Multistep(order, "noise", coordinate, lower_order_final=lower_order_final)


def DPMSolver(  # noqa: N802
    order: int = 3,
    *,
    steps: Literal["multi", "single", "fast"] = "multi",
    lower_order_final: bool | None = None,
) -> Multistep | Singlestep:
    """Lu et al.'s sampler for noise (NeurIPS 2022).

    Arguments:
        order: how many outputs are combined.
        steps: "multi" keeps outputs from step to step; "single" evaluates ``order`` times in each step, up to 3; "fast"
            is "single" with shorter steps at the end, where ``num_steps`` is the number of evaluations.
        lower_order_final: whether the last steps of "multi" combine fewer; None lets the grid decide.

    Raises:
        ValueError: for another order or kind of steps.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DPMSolver(3, steps="single")
        Singlestep(order=3)
    """
    return _lu("noise", order, steps, lower_order_final, 0.0)


def DPMSolverPP(  # noqa: N802
    order: int = 2,
    *,
    steps: Literal["multi", "single", "fast"] = "multi",
    tau: float = 0.0,
    lower_order_final: bool | None = None,
) -> Multistep | Singlestep:
    """Lu et al.'s sampler for data (DPM-Solver++, 2022), and with tau = 1 its variant for the stochastic equation.

    Arguments:
        order: how many outputs are combined.
        steps: "multi" keeps outputs from step to step; "single" evaluates ``order`` times in each step, up to 3; "fast"
            is "single" with shorter steps at the end, where ``num_steps`` is the number of evaluations.
        tau: how much of the noise of the reverse equation is kept, for "multi".
        lower_order_final: whether the last steps of "multi" combine fewer; None lets the grid decide.

    Raises:
        ValueError: for another order or kind of steps.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DPMSolverPP(2, tau=1.0).tau
        1.0
    """
    return _lu("data", order, steps, lower_order_final, tau)


def UniPC(  # noqa: N802
    order: int = 3, *, reads: Literal["noise", "data"] = "data", lower_order_final: bool | None = None
) -> Multistep:
    """Zhao et al.'s sampler (NeurIPS 2023): a predictor, and a corrector that costs no evaluation.

    From order 3 on its weights are those of Lagrange's interpolation, whatever the function B(h) of the paper; steps of
    lower order, the first ones too, take B(h) = e^h - 1 ("bh2").

    Arguments:
        order: how many outputs the predictor combines; the corrector combines one more.
        reads: "data" or "noise", what the polynomial goes through.
        lower_order_final: whether the last steps combine fewer; None lets the grid decide.

    Raises:
        ValueError: for another order.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.UniPC(2).corrector
        True
    """
    return Multistep(order, reads, half=True, corrector=True, lower_order_final=lower_order_final)


def iPNDM(order: int = 4) -> Multistep:  # noqa: N802
    """Liu et al.'s sampler (ICLR 2022) without its warm-up: weights of uniform steps, whatever the grid.

    Arguments:
        order: how many outputs are combined.

    Raises:
        ValueError: for another order.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.iPNDM(2).uniform
        True
    """
    return Multistep(order, "noise", uniform=True)


def _lu(
    reads: Literal["noise", "data"], order: int, steps: str, lower: bool | None, tau: float
) -> Multistep | Singlestep:
    if steps not in ("multi", "single", "fast"):
        raise ValueError(f'steps must be "multi", "single" or "fast", got {steps!r}.')
    if steps == "multi":
        return Multistep(order, reads, half=True, tau=tau, lower_order_final=lower)
    check_order(order, 3)
    if tau or lower is not None:
        raise ValueError('tau and lower_order_final go with steps="multi".')
    if steps == "fast" and order != 3:
        raise ValueError(f'steps="fast" mixes orders 3, 2 and 1: pass order=3, got {order}.')
    return Singlestep(order, reads, fast=steps == "fast")
