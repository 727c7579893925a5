"""One row and its scan; knows nothing of how gradients are to come back beyond what a scan stores."""

from ._row import Carry as Carry
from ._row import Rows as Rows
from ._row import adopt_state as adopt_state
from ._row import asks_otherwise as asks_otherwise
from ._row import first_carry as first_carry
from ._row import loops_over_stages as loops_over_stages
from ._row import make_rows as make_rows
from ._row import prepare_solver as prepare_solver
from ._row import restarts as restarts
from ._row import straighten as straighten
from ._row import take_step as take_step
from ._row import with_noise_of_step as with_noise_of_step
from ._scan import Checkpoints as Checkpoints
from ._scan import checkpointed_scan as checkpointed_scan
from ._scan import walk as walk
