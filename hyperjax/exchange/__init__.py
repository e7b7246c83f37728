"""Exchange rules: how members of a population influence one another, one rule per file."""

from ._all_reduce import all_reduce as all_reduce
from ._hdet import HdetEvents as HdetEvents
from ._hdet import HdetState as HdetState
from ._hdet import hdet as hdet
from ._hdet import scatter as scatter
from ._hdet_loop import HdetLoop as HdetLoop
from ._hdet_loop import LoopEvents as LoopEvents
from ._hdet_loop import LoopState as LoopState
from ._hdet_loop import hdet_loop as hdet_loop
from ._isolation import isolation as isolation
from ._lineage import lineage as lineage
from ._pb2 import PB2Events as PB2Events
from ._pb2 import PB2State as PB2State
from ._pb2 import pb2 as pb2
from ._perturb import perturb as perturb
from ._replace import Events as Events
from ._resample import resample as resample
from ._tournament import tournament as tournament
from ._truncation import truncation as truncation
