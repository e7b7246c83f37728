"""Files, clock, terminal: the `hyperjax` command and all that is not pure."""

from ._cli import main as main
from ._contest import Comparison as Comparison
from ._contest import compare_estimators as compare_estimators
from ._contest_case import Contestant as Contestant
from ._contestants import CONTESTANTS as CONTESTANTS
