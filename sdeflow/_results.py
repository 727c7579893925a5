"""How a computation ended: ``RESULTS``, ``is_okay``, ``check`` and ``SolveError``.

A failure is data. Inside a trace it travels as a member of ``RESULTS`` (an extension of ``diffrax.RESULTS``); called
eagerly, `sdeflow.solve` reads it on the host and raises ``SolveError``. No callback is ever planted in a program
unless the user asks for one with ``check``.
"""

import warnings
from typing import Any, TypeVar

import diffrax
import jax
from jaxtyping import Array, Bool

from ._compat import enumeration_of, is_concrete, messages, names, values_of

_T = TypeVar("_T")


class _Described(type(diffrax.RESULTS)):
    """Looks up what a member is printed by: diffrax's success has an empty sentence, and batches print all theirs."""

    def __getitem__(cls, item: Any) -> str:
        text = super().__getitem__(item)
        if not is_concrete(*jax.tree_util.tree_leaves(item)) or text == "unknown":
            return text
        count = values_of(item).size
        bad = message_of(item)
        if bad or count > 1:
            return bad or f"all {count} successful"
        return text or "successful"


with warnings.catch_warnings():
    # optimistix has a `nonfinite` of its own, about nonlinear solves; ours says what it means here.
    warnings.simplefilter("ignore")

    class RESULTS(diffrax.RESULTS, metaclass=_Described):  # pyright: ignore[reportGeneralTypeIssues]
        """Every way a computation of sdeflow can end; the messages say what to do."""

        __module__ = "sdeflow"

        nonfinite = (
            "The solution became infinite or NaN. Take smaller steps, or check the drift and the diffusion where the "
            "solution was last finite."
        )
        record_overflow = (
            "More steps were accepted than the record of the adaptive solve holds. "
            "Use `DiscreteAdjoint(record=...)` with a larger number."
        )
        sinkhorn_not_converged = (
            "Sinkhorn's iterations did not reach the requested marginal error. Raise epsilon or allow more iterations."
        )
        nonfinite_loss = (
            "The training loss was infinite or NaN. Lower the learning rate or clip gradients; "
            "the best parameters so far were kept."
        )
        nonfinite_validation = (
            "No validation loss was finite, so the last parameters were returned. Look for NaN in the validation data, "
            'and see history["validation_loss"].'
        )
        interrupted = "Training was interrupted. The state so far was kept."
        degenerate_diffusion = (
            "The divergence of two path laws is infinite or NaN while the solution is finite: the diffusion is 0 "
            "somewhere. Keep it away from 0, e.g. add 0.001 to what a softplus gives."
        )
        bad_times = (
            "The traced times do not fit: they are not finite, not strictly monotone (only the last may be repeated, "
            "as padding), closer than their precision can tell apart, not those of the grid, or decreasing where "
            "diffrax steps backwards wrongly. Sort or rescale ts, and build the grid with `sf.grids.through(ts, ...)`."
        )


class SolveError(RuntimeError):
    """An eager solve failed. ``.result`` is the member of ``RESULTS``, ``.message`` its sentence."""

    def __init__(self, result: Any, message: str):
        super().__init__(message)
        self.result = result
        self.message = message


def promote(result: Any) -> Any:
    """Carry a member of ``diffrax.RESULTS`` or ``optimistix.RESULTS`` over to our ``RESULTS``."""
    if enumeration_of(result) is RESULTS:
        return result
    return RESULTS.promote(result)


def demote(result: Any) -> Any:
    """Carry a member of our ``RESULTS`` back to diffrax's; what diffrax does not know is its internal error."""
    known = names(diffrax.RESULTS)
    out = diffrax.RESULTS.internal_error
    for name in known:
        out = diffrax.RESULTS.where(result == getattr(RESULTS, name), getattr(diffrax.RESULTS, name), out)
    return out


def is_okay(result: Any) -> Bool[Array, "..."]:
    """Whether a result means success (reaching a terminating event counts as success).

    Works on members of ours, of ``diffrax.RESULTS`` and of ``optimistix.RESULTS``, batched or traced.

    Example:
        >>> import sdeflow as sf
        >>> bool(sf.is_okay(sf.RESULTS.successful)), bool(sf.is_okay(sf.RESULTS.nonfinite))
        (True, False)
    """
    result = promote(result)
    with jax.ensure_compile_time_eval():
        return (result == RESULTS.successful) | (result == RESULTS.event_occurred)


def message_of(result: Any) -> str:
    """The sentence of a concrete result: the first failure's, where there are several."""
    values = values_of(promote(result)).ravel()
    okay = {int(values_of(RESULTS.successful)), int(values_of(RESULTS.event_occurred))}
    bad = [int(v) for v in values if int(v) not in okay]
    if not bad:
        return ""
    message = messages(RESULTS)[bad[0]]
    return message if len(values) == 1 else f"{len(bad)} of {len(values)} paths failed. The first: {message}"


def failure_in_brackets(result: Any) -> str:
    """`` (failed: ...)`` for a ``repr`` whose result is known and is a failure, else nothing."""
    if result is None or not all(hasattr(x, "size") and is_concrete(x) for x in jax.tree_util.tree_leaves(result)):
        return ""
    message = message_of(result)
    return f" (failed: {message})" if message else ""


def check(sol: _T) -> _T:
    """Return ``sol`` unchanged, with a run-time error planted if its result is a failure.

    For use inside ``jit``, where `sdeflow.solve` cannot raise. It plants a host callback (``equinox.error_if``), so
    the compiled program is no longer kept by JAX's persistent cache.
    """
    result = promote(sol.result)  # pyright: ignore[reportAttributeAccessIssue]
    return result.error_if(sol, ~is_okay(result))
