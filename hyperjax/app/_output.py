"""Where the commands write: a terminal, a pipe, or a script that wants JSON."""

import json
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command: Rich would exit with 1, which here means a fault was found."""
        raise


@dataclass(frozen=True)
class Output:
    """Standard output for results, standard error for everything about them.

    With `as_json` every result is one JSON object on a line of its own and nothing else is
    written to standard output.
    """

    as_json: bool = False
    console: Console = field(default_factory=lambda: _Console(highlight=False))
    notes: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    @property
    def interactive(self) -> bool:
        return self.console.is_terminal and not self.as_json

    def line(self, text: str) -> None:
        """One line for people; to standard error when the output is JSON."""
        target = self.notes if self.as_json else self.console
        target.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.notes.print(text, style="yellow", markup=False, soft_wrap=True)

    def result(self, value: dict, table: Table | None = None, plain: str = "") -> None:
        """A result: the JSON object for scripts, the table on a terminal, plain text in a pipe."""
        if self.as_json:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()
        elif table is not None and self.console.is_terminal:
            self.console.print(table)
        else:
            self.console.print(plain, markup=False, soft_wrap=True)


def silent() -> Output:
    """Writes nothing: the first of several processes speaks for all."""
    return Output(console=_Console(quiet=True), notes=Console(quiet=True))
