"""Linear solves by products with the matrix only: `solve(matvec, b, x0) -> (x, SolveInfo)`."""

from ._cg import cg as cg
from ._linear_solve import linear_solve as linear_solve
from ._neumann import neumann as neumann
