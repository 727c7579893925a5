"""The algebra of losses: ``+``, ``*``, and the one model call that the terms of a sum share."""

import abc
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._results import is_okay
from ._prediction import Prediction
from ._rows import row_mean, row_weight, without_filler

Metrics = dict[str, Any]
Weight = float | Callable[[Any], Any]


class AbstractLoss(eqx.Module):
    """A loss: ``loss(model, batch, key, step) -> (scalar, metrics)``, added, subtracted and scaled.

    ``A + B``, ``A - B``, ``-A``, ``weight * A`` and ``A / number`` are losses. A factor is a finite number or an optax
    schedule (a callable of the step). A regulariser of `sdeflow.regularisers` and any callable of the same signature
    may be added too.
    """

    @abc.abstractmethod
    def __call__(
        self, model: Any, batch: PyTree, key: PRNGKeyArray, step: Array | int
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of ``model`` on ``batch`` at ``step``, and a dict of scalars to record."""

    def __add__(self, other: Any) -> "Sum":
        if not _is_term(other):
            return NotImplemented
        return Sum((*_terms_of(self), *_terms_of(other)))

    def __radd__(self, other: Any) -> "Sum":
        if isinstance(other, int | float) and other == 0:  # the start of the built-in `sum`
            return Sum(_terms_of(self))
        if not _is_term(other):
            return NotImplemented
        return Sum((*_terms_of(other), *_terms_of(self)))

    def __mul__(self, weight: Weight) -> "Sum":
        _check_weight(weight)
        return Sum(tuple((term, _product(weight, own)) for term, own in _terms_of(self)))

    def __rmul__(self, weight: Weight) -> "Sum":
        return self * weight

    def __truediv__(self, number: float) -> "Sum":
        if callable(number):
            raise TypeError(f"A loss was divided by {number!r}; divide by a number, or multiply by a schedule.")
        _check_weight(number)
        if number == 0:
            raise ValueError("A loss was divided by 0; a weight must be finite.")
        return self * (1 / number)

    def __neg__(self) -> "Sum":
        return self * -1.0

    def __sub__(self, other: Any) -> "Sum":
        if not _is_term(other):
            return NotImplemented
        return self + -Sum(_terms_of(other))

    def __rsub__(self, other: Any) -> "Sum":
        if not _is_term(other):
            return NotImplemented
        return Sum(_terms_of(other)) + -self


class AbstractPredictionLoss(AbstractLoss):
    """A loss that reads a `Prediction`; in a sum, all of these score the prediction of one model call."""

    @abc.abstractmethod
    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """The value of this loss for ``prediction``, and a dict of scalars to record."""

    def __call__(
        self, model: Any, batch: PyTree, key: PRNGKeyArray, step: Array | int
    ) -> tuple[Float[Array, ""], Metrics]:
        """Call ``model(batch, key=key, regularisers=())`` once and score what it predicts."""
        batch = without_filler(batch)
        prediction = _predict(model, batch, key, ())
        value, metrics = self.score(prediction, batch, step)
        return value, {**metrics, **_failures(prediction, batch)}


class FunctionLoss(AbstractLoss):
    """A plain function ``fn(model, batch, key, step) -> (scalar, metrics)`` as a loss that can be scaled.

    Example:
        >>> import jax
        >>> from sdeflow.training import FunctionLoss
        >>> half = 0.5 * FunctionLoss(lambda model, batch, key, step: (model * batch, {}))
        >>> half(3.0, 4.0, jax.random.key(0), 0)[0].item()
        6.0
    """

    fn: Callable[..., Any]

    def __call__(
        self, model: Any, batch: PyTree, key: PRNGKeyArray, step: Array | int
    ) -> tuple[Float[Array, ""], Metrics]:
        """Call the function."""
        return self.fn(model, batch, key, step)


class Sum(AbstractLoss):
    r"""``sum_i w_i(step) loss_i``; what ``+`` and ``*`` build.

    The model is called once, with ``key``, for all terms that read a prediction, and is given every
    regulariser of the sum; the cost of each is then read from ``prediction.penalties`` under its class name.
    Any other callable gets the model itself and a key of its own. The metrics hold the unweighted value of
    every term under its class name, beside the metrics that the terms report.

    Arguments:
        terms: pairs of a term and its weight, a finite number or a callable of the step.

    Raises:
        TypeError: a term is not a loss, a regulariser or a callable, or a weight not a number or a callable.
        ValueError: a weight is not finite, there is no term, or two regularisers have the same class.

    Example:
        >>> import optax
        >>> from sdeflow.training import CrossEntropy, MaskedMSE
        >>> loss = CrossEntropy() + optax.linear_schedule(0.0, 1.0, 100) * MaskedMSE()
        >>> len(loss.terms)
        2
    """

    terms: tuple[tuple[Any, Weight], ...]

    def __init__(self, terms: Sequence[tuple[Any, Weight]]):
        flat = []
        for term, weight in terms:
            _check_weight(weight)
            for inner, own in _terms_of(term):
                _check_weight(own)
                flat.append((inner, _product(weight, own)))
        if not flat:
            raise ValueError("A sum of losses has no term; give at least one.")
        names = [type(term).__name__ for term, _ in flat if _is_regulariser(term)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"The sum of losses has the regulariser {twice[0]} twice; add its weights up instead.")
        self.terms = tuple(flat)

    def __call__(
        self, model: Any, batch: PyTree, key: PRNGKeyArray, step: Array | int
    ) -> tuple[Float[Array, ""], Metrics]:
        """Call the model once and add the weighted terms up."""
        safe = without_filler(batch)
        regularisers = tuple(term for term, _ in self.terms if _is_regulariser(term))
        prediction: Any = None
        if regularisers or any(isinstance(term, AbstractPredictionLoss) for term, _ in self.terms):
            prediction = _predict(model, safe, key, regularisers)
        total, metrics = 0.0, {}
        for index, (term, weight) in enumerate(self.terms):
            if _is_regulariser(term):
                value, own = _penalty(prediction, term, safe), {}
            elif isinstance(term, AbstractPredictionLoss):
                value, own = term.score(prediction, safe, step)
            else:
                value, own = scored(term, model, batch, jax.random.fold_in(key, index), step)
            value = jnp.asarray(value)
            factor = weight(step) if callable(weight) else weight
            total = total + jnp.asarray(factor).astype(value.dtype) * value
            for name, metric in {name_of(term): value, **own}.items():
                metrics[_unused(name, metrics)] = metric
        if prediction is not None:
            metrics.update(_failures(prediction, safe))
        return jnp.asarray(total), metrics


def name_of(loss: Any) -> str:
    """The name of a loss in messages and metrics: a function's own, else that of its class."""
    if isinstance(loss, FunctionLoss):
        return name_of(loss.fn)
    name = getattr(loss, "__name__", None)
    return name if isinstance(name, str) else type(loss).__name__


def scored(
    loss: Any, model: Any, batch: PyTree, key: PRNGKeyArray, step: Array | int
) -> tuple[Float[Array, ""], Metrics]:
    """Call any loss and check what it returns; a TypeError names the loss."""
    out = loss(model, batch, key, step)
    name = name_of(loss)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise TypeError(f"The loss {name} returned {_kind(out)}; return a pair (scalar, dict of metrics).")
    value, metrics = out
    if not _is_real_scalar(value, inexact=True):
        raise TypeError(f"The loss {name} returned {_kind(value)} as its value; return a real floating scalar.")
    for key_, metric in metrics.items():
        if not isinstance(key_, str) or not _is_real_scalar(metric, inexact=False):
            raise TypeError(f"The loss {name} returned the metric {key_!r}: {_kind(metric)}; metrics are scalars.")
    return jnp.asarray(value), {name: jnp.asarray(metric) for name, metric in metrics.items()}


def _is_real_scalar(x: Any, *, inexact: bool) -> bool:
    if not hasattr(x, "dtype") and not isinstance(x, bool | int | float):
        return False
    dtype = jnp.result_type(x)
    kinds = (jnp.floating,) if inexact else (jnp.floating, jnp.integer, jnp.bool_)
    return jnp.shape(x) == () and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _kind(x: Any) -> str:
    if hasattr(x, "dtype"):
        return f"an array of shape {jnp.shape(x)} and dtype {x.dtype}"
    return f"an object of type {type(x).__name__}"


def _is_regulariser(x: Any) -> bool:
    return bool(getattr(x, "is_regulariser", False)) and not isinstance(x, type)


def _is_term(x: Any) -> bool:
    return not isinstance(x, type) and (_is_regulariser(x) or callable(x))


def _terms_of(x: Any) -> tuple[tuple[Any, Weight], ...]:
    """What ``x`` adds to a sum. A scaled regulariser has a ``.regulariser`` and a ``.weight``."""
    if isinstance(x, Sum):
        return x.terms
    if _is_regulariser(x) and hasattr(x, "regulariser"):
        return ((x.regulariser, x.weight),)
    if not _is_term(x):
        what = f"the class {x.__name__}; call it" if isinstance(x, type) else f"{x!r}; add losses or regularisers"
        raise TypeError(f"A sum of losses was given {what}.")
    return ((x, 1.0),)


class _Product(eqx.Module):
    """The product of two weights, at least one of which is a schedule."""

    factors: tuple[Any, Any]

    def __call__(self, step: Any) -> Any:
        values: list[Any] = [f(step) if callable(f) else f for f in self.factors]
        return values[0] * values[1]


def _product(one: Weight, two: Weight) -> Weight:
    if callable(one) or callable(two):
        if not callable(one) and one == 1.0:
            return two
        return one if not callable(two) and two == 1.0 else _Product((one, two))
    return one * two


def _check_weight(weight: Any) -> None:
    if callable(weight) and not isinstance(weight, AbstractLoss):
        return
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise TypeError(f"A loss was multiplied by {weight!r}; a weight is a number or a callable of the step.")
    if not math.isfinite(weight):
        raise ValueError(f"A loss was multiplied by {weight}; a weight must be finite.")


def _predict(model: Any, batch: PyTree, key: PRNGKeyArray, regularisers: tuple) -> Prediction:
    if not callable(model):
        raise TypeError(
            f"The model {type(model).__name__} is not callable; losses on predictions call "
            "`model(batch, key=key, regularisers=())`."
        )
    prediction: Any = model(batch, key=key, regularisers=regularisers)
    if not hasattr(prediction, "outputs"):
        raise TypeError(f"The model {type(model).__name__} returned {_kind(prediction)}; return a `Prediction`.")
    return prediction


def _penalty(prediction: Any, regulariser: Any, batch: PyTree) -> Float[Array, ""]:
    name = type(regulariser).__name__
    if name not in prediction.penalties:
        raise ValueError(
            f"The sum of losses has the regulariser {name} but the model returned penalties for "
            f"{sorted(prediction.penalties)}; pass `regularisers` on to its solve."
        )
    value = jnp.asarray(prediction.penalties[name])
    if value.ndim == 0:
        return value
    if value.ndim > 1:
        raise ValueError(f"The penalty of {name} has shape {value.shape}; return a scalar or one number per row.")
    return row_mean(value, row_weight(batch, value.shape[0], value.dtype))


def _failures(prediction: Prediction, batch: PyTree) -> Metrics:
    """The share of rows whose solve failed, under "failed", if the model says how its solve ended."""
    if getattr(prediction, "result", None) is None:
        return {}
    failed = (~is_okay(prediction.result)).astype(jnp.float32)
    if failed.ndim:
        failed = failed.reshape(failed.shape[0], -1).max(axis=1)
        failed = row_mean(failed, row_weight(batch, failed.shape[0], failed.dtype))
    return {"failed": failed}


def _unused(name: str, taken: Metrics) -> str:
    number = 2
    base = name
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name
