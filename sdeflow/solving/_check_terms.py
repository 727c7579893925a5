"""Whether the terms are those that the solver takes, in one sentence where diffrax shows both as trees."""

from typing import Any, get_args, get_origin

import diffrax
import jax
from jaxtyping import PyTree

from .._compat import TermAndSolverIncompatible, assert_term_compatible


def check_terms(terms: Any, solver: diffrax.AbstractSolver, t: Any, y0: PyTree, args: Any) -> None:
    """Refuse terms that the solver does not take, while tracing.

    Raises:
        ValueError: naming what it takes, what it was given, and what to do.
    """
    wanted = solver.term_structure
    try:
        with jax.numpy_dtype_promotion("standard"):
            assert_term_compatible(t, y0, args, terms, wanted, solver.term_compatible_contr_kwargs)
    except (TermAndSolverIncompatible, AssertionError) as error:
        name, expected, given = type(solver).__name__, _expected(wanted), _given(terms)
        if _count(wanted) == _count(terms) and type(error) is TermAndSolverIncompatible:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            if isinstance(root, TermAndSolverIncompatible) and "is incompatible" in str(root):
                given += ", whose vector field or control is of another type"
        raise ValueError(
            f"The terms are not compatible with {name}, which takes {expected}; they are {given}: "
            f"{_cure(wanted, terms)}"
        ) from error


def _members(structure: Any) -> tuple[Any, ...] | None:
    """The types within ``MultiTerm[tuple[...]]``; None for another structure."""
    if get_origin(structure) is not diffrax.MultiTerm:
        return None
    return get_args(get_args(structure)[0])


def _name(kind: Any) -> str:
    return (get_origin(kind) or kind).__name__


def _count(x: Any) -> tuple[str, int]:
    """The form of terms or of a structure: one term, a MultiTerm or a tuple, and of how many."""
    if isinstance(x, diffrax.MultiTerm):
        return "multi", len(x.terms)
    inner = _members(x)
    if inner is not None:
        return "multi", len(inner)
    return ("tuple", len(x)) if isinstance(x, tuple) else ("one", 1)


def _expected(structure: Any) -> str:
    inner = _members(structure)
    if inner is not None:
        names = [_name(kind) for kind in inner]
        plain = all(name == "AbstractTerm" for name in names)
        return f"a diffrax.MultiTerm of {len(names)} terms" + ("" if plain else f" ({', '.join(names)})")
    if isinstance(structure, tuple):
        return f"a tuple of {len(structure)} terms and a state that is a tuple of {len(structure)}"
    return "one term" if _name(structure) == "AbstractTerm" else f"one {_name(structure)}"


def _given(terms: Any) -> str:
    name = lambda term: type(term).__name__
    if isinstance(terms, diffrax.MultiTerm):
        return f"MultiTerm({', '.join(map(name, terms.terms))})"
    if isinstance(terms, tuple):
        return f"the tuple ({', '.join(map(name, terms))}{',' if len(terms) == 1 else ''})"
    return name(terms)


def _cure(structure: Any, terms: Any) -> str:
    (form, count), (own, number) = _count(structure), _count(terms)
    if form == "multi" and own == "tuple" and number == count:
        return "pass diffrax.MultiTerm(*terms)."
    if form == "one" and own == "tuple":
        return "pass the term itself." if number == 1 else "pass diffrax.MultiTerm(*terms), whose terms are summed."
    if form == "tuple":
        return f"pass {count} terms, each moving its part of the state, or use a solver of the whole state."
    if form == "multi" and own == "one":
        return "pass the terms of both parts, or use a solver of one term such as diffrax.Tsit5()."
    return "pass those, or use a solver that takes what there is, such as diffrax.Heun()."
