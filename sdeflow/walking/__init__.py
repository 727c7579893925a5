"""One row and its scan; knows nothing of how gradients are to come back beyond what a scan stores."""

from ._row import Carry as Carry, Rows as Rows, first_carry as first_carry, make_rows as make_rows, prepare_solver as prepare_solver
from ._scan import checkpointed_scan as checkpointed_scan, walk as walk
