"""The jobs of ``python -m sdeflow demo``: each yields the sentences to print and leaves a figure behind."""

from collections.abc import Callable, Iterator

from ._bridges import bridges as bridges
from ._ending import InputError as InputError
from ._samplers import samplers as samplers
from ._series import series as series

JOBS: dict[str, Callable[..., Iterator[str]]] = {"bridges": bridges, "samplers": samplers, "series": series}
