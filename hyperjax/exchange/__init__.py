"""Exchange rules: how members of a population influence one another, one rule per file."""

from ._isolation import isolation as isolation
from ._perturb import perturb as perturb
from ._replace import Events as Events
from ._tournament import tournament as tournament
from ._truncation import truncation as truncation
