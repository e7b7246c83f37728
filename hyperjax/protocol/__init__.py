"""How to compare so that what is reported holds: seeds, folds, intervals, multiplicity."""

from ._folds import NestedFolds as NestedFolds
from ._folds import nested_folds as nested_folds
from ._multiplicity import Multiplicity as Multiplicity
from ._multiplicity import multiplicity as multiplicity
from ._statistics import Comparison as Comparison
from ._statistics import Interval as Interval
from ._statistics import Ranks as Ranks
from ._statistics import average_ranks as average_ranks
from ._statistics import compare as compare
from ._statistics import interval as interval
from ._study import Declared as Declared
from ._study import Study as Study
from ._study import Trials as Trials
from ._study import declare as declare
from ._study import study as study
from ._subset import Subset as Subset
from ._subset import discrepancies as discrepancies
from ._subset import rank_coordinates as rank_coordinates
from ._subset import representative as representative
from ._transfer import Transfer as Transfer
from ._transfer import transfer as transfer
