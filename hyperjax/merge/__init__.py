"""One model out of many: averages of trained members, and sums of what they learnt."""

from ._breadcrumbs import Merged as Merged
from ._breadcrumbs import breadcrumbs as breadcrumbs
from ._breadcrumbs import task_arithmetic as task_arithmetic
from ._breadcrumbs import task_vectors as task_vectors
from ._soups import GreedyInfo as GreedyInfo
from ._soups import LearnedInfo as LearnedInfo
from ._soups import Soup as Soup
from ._soups import greedy as greedy
from ._soups import learned as learned
from ._soups import mix as mix
from ._soups import uniform as uniform
from ._ties import ties as ties
