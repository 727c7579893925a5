"""An extension for griffe, which reads the docstrings: an ``Example:`` is a session to be shown as code.

The style has a section ``Examples:`` only, and would set a single one as prose in a box.
"""

import re
from typing import Any

import griffe


class SingleExample(griffe.Extension):
    """Read ``Example:`` as ``Examples:``."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the heading in the docstring of whatever was just read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
