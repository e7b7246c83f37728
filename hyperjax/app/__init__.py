"""Files, clock, terminal: the `hyperjax` command and all that is not pure."""

from ._cli import main as main
