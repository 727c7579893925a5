"""Claim: the errors of every fast sampler on a mixture of Gaussians, to the digits that are known.

A mixture of five Gaussians in the plane, whose score is exact, under VP from t = 1 to .001: 512 starts, the root mean
square of all differences from the ordinary equation solved to 1e-12. Three grids without guidance, and two scales of
guidance on equal steps in t. Each cell is ours / known. They are errors of solvers, not qualities of images, and of one
draw of the noise, at the edge of what six draws give for some samplers: they show that formulas are right, not which
sampler is better. The last tables therefore say what six draws give, beside the median over the starts, which samples
between two modes do not reach, and count the evaluations.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf
from tests.helpers import diffusion as gmm

from ._harness import Claim, Options, Row, line

KNOWN = """
== logsnr
Euler in t          0.267    0.248    0.204    0.177    0.152     0.12    0.105   0.0718   0.0377
DDIM                0.434    0.377    0.316    0.272    0.238      0.2     0.17    0.121   0.0682
rho-Heun             2.17     2.91     1.13    0.677    0.335    0.162   0.0931   0.0201  0.00603
iPNDM-4             0.271    0.142    0.091   0.0731   0.0516   0.0146  0.00969  0.00373  0.00117
tAB1                0.348    0.272     0.22    0.173    0.146    0.112    0.098    0.039  0.00875
tAB2                0.288    0.206    0.164    0.125    0.104   0.0799   0.0544  0.00559  0.00117
tAB3                0.283    0.172    0.125   0.0972    0.082   0.0529   0.0311  0.00355 0.000784
rhoAB1              0.409    0.345    0.274    0.221    0.183    0.141    0.119   0.0588   0.0117
rhoAB2              0.406    0.339    0.264    0.207    0.166    0.125   0.0998   0.0174  0.00243
rhoAB3              0.406    0.338    0.261    0.202     0.16    0.115   0.0933  0.00971  0.00071
DPM-Solver-fast      1.18    0.731    0.441    0.207    0.115   0.0572   0.0304  0.00495  0.00135
DPM-Solver 2M       0.308    0.231     0.19    0.153    0.127   0.0991   0.0903   0.0298  0.00483
DPM-Solver 3M       0.293    0.206    0.163    0.123      0.1   0.0678   0.0389  0.00358 0.000758
DPM++ 2M            0.294    0.213    0.177    0.137    0.111   0.0894   0.0652  0.00651  0.00171
DPM++ 2M exact      0.282    0.209    0.182    0.135    0.108   0.0774    0.054  0.00571  0.00184
DPM++ 3M            0.236    0.232    0.196   0.0784   0.0586   0.0224   0.0123  0.00374 0.000908
UniPC-2             0.286    0.198    0.161    0.112   0.0916   0.0536   0.0333  0.00351 0.000911
UniPC-3             0.231    0.207    0.158   0.0723   0.0488   0.0199   0.0106  0.00189 0.000222
UniPC-3 noise       0.267    0.127   0.0739   0.0537   0.0459   0.0136  0.00841  0.00196 0.000222
v3-2                0.306    0.276    0.157    0.117   0.0991   0.0621   0.0316   0.0119    0.004
v3-3                 0.31    0.383    0.222    0.106   0.0634   0.0441   0.0349  0.00376   0.0006
v3-3 corrected      0.256    0.231    0.117   0.0508    0.048   0.0364   0.0339  0.00931 0.000574
v3-3 pseudo           0.3     0.32    0.165    0.113   0.0729   0.0335   0.0254  0.00878  0.00296
BDIA 1              0.635    0.364    0.275    0.257    0.172    0.116   0.0622  0.00626  0.00107
BDIA .5             0.366    0.262    0.222    0.181    0.146    0.124    0.108   0.0629   0.0227
rho-RK3                 -     2.61        -        -     0.21        -        -        -        -
DPM-Solver-2S           -     1.28    0.498    0.262    0.184   0.0876   0.0482  0.00968   0.0031
DPM++ 2S                -    0.327    0.288    0.214    0.183    0.136    0.117    0.058   0.0114
== t
Euler in t          0.211    0.176    0.134    0.108   0.0925   0.0783   0.0703   0.0388   0.0245
DDIM                0.321    0.278    0.232    0.201    0.177    0.149    0.132   0.0937   0.0482
rho-Heun            0.255    0.898    0.418    0.257     0.18    0.104   0.0672   0.0178  0.00524
iPNDM-4              0.26    0.227    0.174    0.147     0.12   0.0726   0.0462   0.0065 0.000747
tAB1                0.213    0.187     0.15    0.128    0.115    0.081   0.0526   0.0115  0.00337
tAB2                0.215    0.194     0.15    0.128    0.103   0.0586   0.0351  0.00688  0.00106
tAB3                0.251    0.223    0.175     0.15    0.122   0.0753   0.0477  0.00676  0.00059
rhoAB1              0.253    0.214    0.173    0.146    0.131    0.107   0.0728   0.0127  0.00337
rhoAB2               0.24    0.203    0.166    0.143    0.128   0.0767   0.0511  0.00666 0.000881
rhoAB3              0.237    0.201    0.167    0.149    0.131   0.0775   0.0437  0.00706 0.000699
DPM-Solver-fast         2    0.146    0.919    0.103   0.0864   0.0573    0.172   0.0167   0.0137
DPM-Solver 2M       0.491    0.457    0.363    0.308    0.251    0.149   0.0951   0.0185  0.00618
DPM-Solver 3M       0.431     0.43    0.406    0.402    0.354    0.244    0.179   0.0348  0.00506
DPM++ 2M            0.272    0.213    0.137    0.404    0.318    0.206    0.132   0.0338   0.0125
DPM++ 2M exact      0.264    0.204    0.129    0.621     0.48    0.303    0.192   0.0502   0.0179
DPM++ 3M            0.266    0.201    0.122      2.2        2     1.37     1.02    0.245   0.0324
UniPC-2             0.257    0.197    0.124   0.0945   0.0768   0.0557   0.0459   0.0183  0.00495
UniPC-3             0.255    0.192    0.118   0.0928   0.0801   0.0589   0.0484   0.0207   0.0048
UniPC-3 noise       0.214    0.161    0.115   0.0867   0.0653    0.043   0.0321   0.0153  0.00542
v3-2                0.327    0.243    0.146   0.0946   0.0634   0.0394    0.031   0.0101  0.00294
v3-3                0.327    0.243    0.145   0.0972   0.0732   0.0531   0.0455   0.0124   0.0032
v3-3 corrected      0.299    0.211    0.121   0.0821   0.0611   0.0433   0.0302  0.00783 0.000713
v3-3 pseudo         0.327    0.243    0.145   0.0941   0.0655   0.0414   0.0336  0.00779  0.00165
BDIA 1              0.214    0.193    0.152    0.132     0.11   0.0669   0.0351  0.00875  0.00234
BDIA .5             0.231    0.202    0.166    0.144    0.132    0.112   0.0916   0.0397   0.0143
rho-RK3                 -    0.612        -        -    0.103        -        -        -        -
DPM-Solver-2S           -     1.39    0.696    0.423     0.29    0.163    0.107   0.0355   0.0108
DPM++ 2S                -    0.413    0.263    0.188    0.147    0.105   0.0843   0.0228  0.00823
== edm
Euler in t          0.308    0.264    0.199    0.172    0.156    0.126    0.106   0.0749   0.0368
DDIM                0.509    0.397    0.334     0.28    0.252     0.21    0.179    0.124   0.0853
rho-Heun            0.325     2.17     1.35    0.832    0.409    0.238    0.126   0.0216  0.00621
iPNDM-4             0.376    0.199    0.132   0.0892   0.0724   0.0346    0.013  0.00422  0.00125
tAB1                0.406    0.275    0.227     0.17    0.155    0.117    0.101   0.0402  0.00682
tAB2                0.328    0.195    0.169    0.119    0.106   0.0822   0.0618  0.00812  0.00187
tAB3                 0.25    0.161    0.135   0.0956   0.0819   0.0576   0.0361  0.00509  0.00116
rhoAB1               0.48    0.358    0.285     0.22    0.192    0.145    0.124   0.0605   0.0122
rhoAB2              0.474    0.347    0.272    0.201    0.171    0.128    0.102   0.0308  0.00212
rhoAB3              0.472    0.343    0.267    0.191    0.164    0.116   0.0949  0.00904 0.000997
DPM-Solver-fast      2.23    0.934    0.521    0.261    0.205   0.0651   0.0468  0.00942  0.00227
DPM-Solver 2M       0.385    0.214     0.19    0.142    0.127      0.1    0.091   0.0328  0.00317
DPM-Solver 3M       0.369    0.191    0.164    0.112   0.0965   0.0738   0.0499  0.00493  0.00131
DPM++ 2M            0.378    0.208    0.189    0.175    0.138   0.0979   0.0738  0.00912  0.00271
DPM++ 2M exact      0.336    0.182    0.205    0.243     0.17    0.104   0.0653  0.00923  0.00303
DPM++ 3M             0.37    0.184    0.192    0.238    0.176    0.102   0.0467  0.00586  0.00123
UniPC-2             0.369    0.196    0.183    0.134    0.108   0.0727   0.0481  0.00517  0.00152
UniPC-3             0.363    0.179    0.179    0.195    0.133   0.0606   0.0362   0.0035 0.000705
UniPC-3 noise       0.476    0.261    0.114   0.0866   0.0604   0.0197   0.0125  0.00292 0.000458
v3-2                0.488    0.516    0.252    0.155    0.126   0.0754   0.0431   0.0193  0.00566
v3-3                0.487     0.51    0.264    0.254    0.213   0.0759   0.0456  0.00639  0.00386
v3-3 corrected      0.354    0.308    0.162    0.127   0.0761   0.0427   0.0375   0.0113  0.00214
v3-3 pseudo         0.488    0.513    0.254    0.179    0.143    0.052   0.0332   0.0104  0.00354
BDIA 1              0.817     0.57    0.475    0.289    0.185    0.156   0.0958   0.0117  0.00171
BDIA .5             0.519    0.373    0.278    0.175    0.162    0.136    0.117   0.0666   0.0249
rho-RK3                 -     0.61        -        -     0.21        -        -        -        -
DPM-Solver-2S           -     1.14    0.614    0.527    0.317    0.128   0.0738   0.0135  0.00402
DPM++ 2S                -    0.398    0.271    0.221    0.218    0.144    0.131   0.0672   0.0128
== 3.0
Euler in t          0.101   0.0696   0.0351   0.0273    0.016  0.00861
DDIM                0.138    0.108   0.0662   0.0536   0.0297   0.0158
rho-Heun            0.241    0.192   0.0931   0.0624    0.019  0.00556
iPNDM-4             0.212   0.0977   0.0569   0.0364   0.0078  0.00119
tAB1                0.103   0.0825   0.0503   0.0371    0.012  0.00342
tAB2                0.108   0.0844   0.0518   0.0345  0.00661  0.00115
tAB3                 0.19   0.0987   0.0578   0.0372  0.00813   0.0012
rhoAB1              0.104   0.0808   0.0491   0.0363   0.0117  0.00311
rhoAB2             0.0928   0.0789   0.0506   0.0343  0.00649 0.000937
rhoAB3             0.0952    0.084   0.0549   0.0362  0.00828  0.00145
DPM-Solver-2S       0.955    0.557     0.16     0.11   0.0372   0.0115
DPM-Solver-fast      1.71   0.0966   0.0527    0.181   0.0167   0.0143
DPM-Solver 2M       0.228    0.214    0.124   0.0804   0.0197  0.00648
DPM-Solver 3M       0.475    0.253    0.155    0.117   0.0347  0.00713
DPM++ 2S            0.195    0.156   0.0886   0.0645   0.0255  0.00891
DPM++ 2M            0.148     0.31    0.183     0.13   0.0382   0.0136
DPM++ 2M exact      0.151    0.486    0.277    0.194   0.0574   0.0194
DPM++ 3M            0.153     2.57    0.919    0.684    0.233   0.0397
UniPC-2             0.145    0.105   0.0546    0.043   0.0184  0.00535
UniPC-3             0.143    0.103   0.0527   0.0429   0.0193  0.00564
UniPC-3 noise       0.153   0.0845   0.0505   0.0376   0.0154  0.00575
BDIA 1              0.122   0.0854   0.0491   0.0325  0.00869  0.00251
BDIA .5             0.103   0.0807   0.0488   0.0366   0.0155  0.00666
== 7.5
Euler in t          0.104    0.069   0.0345   0.0264   0.0141  0.00856
DDIM                0.169    0.135   0.0849   0.0683   0.0353   0.0181
rho-Heun             10.4      2.5    0.119   0.0814    0.025  0.00934
iPNDM-4             0.199    0.166   0.0659   0.0426  0.00805  0.00125
tAB1                 0.16    0.125    0.072   0.0518   0.0181  0.00522
tAB2                 0.17    0.112   0.0625   0.0411    0.008  0.00165
tAB3                0.209    0.153   0.0664   0.0429  0.00814 0.000815
rhoAB1              0.143    0.114   0.0665   0.0479   0.0162  0.00453
rhoAB2              0.134    0.107   0.0614   0.0406  0.00761  0.00123
rhoAB3               0.14    0.107   0.0633   0.0414   0.0082 0.000693
DPM-Solver-2S        13.1    0.688    0.204    0.151   0.0559   0.0169
DPM-Solver-fast      3.18    0.371   0.0733    0.242   0.0245   0.0216
DPM-Solver 2M       0.284    0.252    0.142   0.0965   0.0277     0.01
DPM-Solver 3M       0.504     0.34    0.183     0.14   0.0394  0.00546
DPM++ 2S            0.247    0.212    0.126   0.0949   0.0378   0.0139
DPM++ 2M            0.241    0.329    0.214     0.16   0.0562   0.0208
DPM++ 2M exact      0.251    0.513    0.332    0.247   0.0856   0.0297
DPM++ 3M            0.252     3.41    0.951    0.786    0.263   0.0396
UniPC-2             0.224    0.165   0.0837   0.0638   0.0251  0.00706
UniPC-3             0.222    0.154   0.0794    0.063   0.0257  0.00712
UniPC-3 noise       0.187    0.181   0.0763   0.0575   0.0235  0.00852
BDIA 1              0.218    0.118   0.0618   0.0415   0.0124  0.00382
BDIA .5             0.152    0.112   0.0659   0.0485   0.0201  0.00865
"""
#: sampler, then for 5, 10 and 20 evaluations the mean, least and largest error of six draws, and the median
SPREAD = """
DDIM          .4334 .4128 .4537 .3643  .2569 .2350 .2803 .1806  .1536 .1325 .1704 .0886
iPNDM-4       .2473 .2207 .2711 .1702  .0488 .0253 .0731 .0205  .0292 .0097 .0411 .0058
tAB3          .2693 .2437 .2896 .1289  .0715 .0486 .0972 .0217  .0289 .0178 .0411 .0047
DPM++ 2M      .2809 .2530 .3019 .1260  .1178 .1030 .1366 .0629  .0412 .0171 .0652 .0132
DPM++ 3M      .2226 .2034 .2382 .1697  .0712 .0634 .0847 .0420  .0331 .0123 .0541 .0066
UniPC-3       .2167 .1988 .2315 .1717  .0813 .0723 .0939 .0536  .0307 .0106 .0421 .0039
UniPC-3 noise .2493 .2364 .2672 .2597  .0558 .0474 .0655 .0136  .0230 .0084 .0368 .0014
v3-3          .2938 .2632 .3155 .2078  .1269 .1065 .1432 .0844  .0454 .0261 .0625 .0080
BDIA 1        .6187 .5815 .6452 .7211  .2518 .2454 .2574 .2104  .0576 .0461 .0647 .0257
"""
NFES = {"grid": (5, 6, 8, 10, 12, 16, 20, 40, 80), "guided": (8, 10, 16, 20, 40, 80)}
#: known figures are rounded to three digits; those of v3 depend on the samples that its statistics are made of
DIGITS, SAMPLED = 0.006, 0.2


def multistep(order: int, reads: Any, half: bool = True, **options: Any) -> Callable[[int], tuple[Any, int]]:
    """A sampler with one evaluation a step; those for data drop their order below ten steps."""
    make = functools.partial(sf.diffusion.Multistep, order, reads, half=half, **options)
    return lambda n: (make(lower_order_final=reads == "data" and n < 10), n)


def always(solver: Any, stages: int = 1) -> Callable[[int], tuple[Any, int]]:
    """A sampler that is the same for every number of evaluations."""
    return lambda n: (solver, n // stages)


def heun(n: int) -> tuple[Any, int]:
    """Heun's method in rho; an odd number of evaluations ends with a step of Euler's."""
    return sf.diffusion.Singlestep(method="heun", lower_order_final=bool(n % 2)), -(-n // 2)


@functools.cache
def statistics() -> Any:
    """Of the mixture, for v3."""
    starts = np.random.default_rng(7).standard_normal((256, 2))
    return sf.diffusion.model_statistics(gmm.denoiser(), jnp.asarray(starts), num_cells=1200)


def v3(order: int, **options: Any) -> Callable[[int], tuple[Any, int]]:
    """DPM-Solver-v3 with the statistics of the mixture."""
    return lambda n: (sf.diffusion.DPMSolverV3(statistics(), order, lower_order_final=True, **options), n)


def samplers() -> dict[str, Callable[[int], tuple[Any, int]]]:
    """Every sampler of the tables: from evaluations to the sampler and its number of steps."""
    d = sf.diffusion
    adams = {f"{c}AB{k}": always(d.DEIS(k + 1, c)) for c in ("t", "rho") for k in (1, 2, 3)}  # pyright: ignore
    return {
        "Euler in t": lambda n: (None, n),
        "DDIM": always(d.DDIM()),
        "rho-Heun": heun,
        "iPNDM-4": always(d.iPNDM(4)),
        **adams,
        "DPM-Solver-fast": always(d.DPMSolver(3, steps="fast")),
        "DPM-Solver 2M": multistep(2, "noise"),
        "DPM-Solver 3M": multistep(3, "noise"),
        "DPM++ 2M": multistep(2, "data"),
        "DPM++ 2M exact": multistep(2, "data", half=False),
        "DPM++ 3M": multistep(3, "data"),
        "UniPC-2": always(d.UniPC(2, lower_order_final=True)),
        "UniPC-3": always(d.UniPC(3, lower_order_final=True)),
        "UniPC-3 noise": always(d.UniPC(3, reads="noise", lower_order_final=True)),
        "v3-2": v3(2),
        "v3-3": v3(3),
        "v3-3 corrected": v3(3, corrector=True),
        "v3-3 pseudo": v3(3, pseudo=True),
        "BDIA 1": always(d.BDIA(1.0)),
        "BDIA .5": always(d.BDIA(0.5)),
        "rho-RK3": always(d.Singlestep(method="kutta"), 3),
        "DPM-Solver-2S": always(d.Singlestep(2), 2),
        "DPM++ 2S": always(d.Singlestep(2, "data"), 2),
    }


def known() -> dict[str, dict[str, list[float]]]:
    """The known figures: table, sampler, one for each number of evaluations (NaN where there is none)."""
    tables: dict[str, dict[str, list[float]]] = {}
    for text in KNOWN.strip().splitlines():
        if text.startswith("=="):
            rows = tables.setdefault(text[2:].strip(), {})
        else:
            rows[text[:16].strip()] = [math.nan if x == "-" else float(x) for x in text[16:].split()]
    return tables


def error(
    solver: Any, steps: int, grid: str, scale: float | None, seed: int = 0, measure: Callable[..., float] = gmm.rms
) -> float:
    """The error of one cell."""
    if solver is None:
        equation, ts = sf.diffusion.ProbabilityFlow(gmm.denoiser(scale=scale)), np.array([1.0, 1e-3])
        along = sf.diffusion.sampling_grid(gmm.SCHEDULE, steps, grid)
        end = sf.solve(equation, jnp.asarray(gmm.starts()), ts, grid=along, solver=diffrax.Euler()).final
        return gmm.rms(end, gmm.reference(scale=scale))
    if isinstance(solver, sf.diffusion.DPMSolverV3):
        run = lambda x: sf.diffusion.sample(gmm.denoiser(), x, solver=solver, num_steps=steps, grid=grid)
        return measure(jax.vmap(run)(jnp.asarray(gmm.starts(seed=seed))), gmm.reference(seed=seed))
    return gmm.error(solver, steps, grid, scale, seed=seed, measure=measure)


def one_table(title: str, figures: dict[str, list[float]], grid: str, scale: float | None, options: Options) -> Claim:
    """One of the five tables."""
    nfes = NFES["grid" if scale is None else "guided"]
    rows: list[Row] = []
    for name, make in samplers().items():
        if name not in figures:
            continue
        cells, worst = [], 0.0
        for nfe, wanted in zip(nfes, figures[name]):
            if math.isnan(wanted) or (options.quick and nfe not in (10, 20)):
                continue
            ours = error(*make(nfe), grid, scale)
            cells.append(f"{nfe}: {ours:.3g} / {wanted:g}")
            worst = max(worst, abs(ours / wanted - 1))
        # Less than half of the last digit, plus the one of ours.
        allowed = SAMPLED if name.startswith("v3") else DIGITS
        rows.append(line(name, worst, (0.0, allowed), ", ".join(cells)))
    return Claim("diffusion", title, "512 starts, float64; evaluations: ours / known", "the known figures", rows)


def lengths(x: Any, y: Any) -> float:
    """The median over samples of the length of the difference."""
    return float(np.median(np.linalg.norm(np.asarray(x) - y, axis=1)))


def six_draws(options: Options) -> Claim:
    """The table of what the errors of one draw are worth."""
    rows: list[Row] = []
    for text in SPREAD.strip().splitlines():
        name, figures = text[:13].strip(), np.reshape([float(x) for x in text[13:].split()], (3, 4))
        cells, worst = [], 0.0
        for nfe, wanted in zip((5, 10, 20), figures):
            if options.quick and nfe != 10:
                continue
            solver, steps = samplers()[name](nfe)
            each = [error(solver, steps, "logsnr", None, seed) for seed in range(6)]
            middle = np.mean([error(solver, steps, "logsnr", None, seed, lengths) for seed in range(6)])
            ours = np.array([np.mean(each), min(each), max(each), middle])
            show = lambda x: f"{x[0]:.4f} [{x[1]:.4f}, {x[2]:.4f}], median {x[3]:.4f}"
            cells.append(f"{nfe}: {show(ours)} / {show(wanted)}")
            worst = max(worst, ((abs(ours - wanted) - 5e-5) / wanted).max())  # known to four places
        rows.append(line(name, worst, (0.0, SAMPLED if name.startswith("v3") else DIGITS), "; ".join(cells)))
    setting = "512 starts; evaluations: mean [least, largest] and mean of the medians, ours / known"
    return Claim("diffusion", "errors of six draws, grid logsnr", setting, "the known figures", rows)


def evaluations(options: Options) -> Claim:
    """The table of counted evaluations, for ten steps with one each."""
    rows: list[Row] = []
    for name, make in samplers().items():
        solver, steps = make(10)
        if solver is None or isinstance(solver, sf.diffusion.Singlestep):
            continue
        seen: list[int] = []

        def network(t: Any, x: Any, args: Any) -> Any:
            jax.debug.callback(lambda _: seen.append(1), t)  # noqa: B023
            return gmm.noise_of(x, gmm.SCHEDULE.alpha(t), gmm.SCHEDULE.sigma(t))

        counting = sf.diffusion.Denoiser(network, gmm.SCHEDULE)
        jax.block_until_ready(sf.diffusion.sample(counting, jnp.ones(2), solver=solver, num_steps=steps))
        jax.effects_barrier()
        rows.append(line(name, len(seen), (9.5, 10.5)))
    return Claim("diffusion", "evaluations of the network, counted", "10 steps", "nothing: numbers", rows)


def run(options: Options) -> list[Claim]:
    """All tables."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        tables, claims = known(), []
        title = "errors on the mixture, grid"
        claims += [one_table(f"{title} {grid}", tables[grid], grid, None, options) for grid in ("logsnr", "t", "edm")]
        claims += [
            one_table(f"{title} t, guidance {scale}", tables[scale], "t", float(scale), options)
            for scale in ("3.0", "7.5")
        ]
        return [*claims, six_draws(options), evaluations(options)]
    finally:
        jax.config.update("jax_enable_x64", before)
