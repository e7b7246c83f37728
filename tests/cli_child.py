"""A process that runs commands as they come on standard input, each with a fault on its way.

`cli_runs.Shell` starts it. A line is a JSON object with `argv` and, for a fault, `at`: the signal
`signal` is sent to this very process when it opens, makes or renames a path that contains
`at[0]` for the `at[1]`-th time. `limit` is the size in bytes beyond which files do not grow.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
from typing import Any

FAULT = {}


def watch(event: str, args: tuple) -> None:
    if FAULT and event in ("open", "os.mkdir", "os.rename"):
        paths = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
        if any(FAULT["at"][0] in path for path in paths):
            FAULT["at"][1] -= 1
            if FAULT["at"][1] == 0:
                number = getattr(signal, FAULT["signal"])
                FAULT.clear()
                os.kill(os.getpid(), number)


def run(argv: list[str]) -> tuple[object, str, str]:
    from hyperjax.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


if __name__ == "__main__":
    absent: Any = None
    sys.addaudithook(watch)
    for line in sys.stdin:
        command = json.loads(line)
        if "at" in command:
            FAULT.update(at=command["at"], signal=command["signal"])
        if not command["plots"]:
            sys.modules["matplotlib"] = absent  # as if it were not installed, which is faster
        limit_files(command.get("limit", resource.RLIM_INFINITY))
        result = run(command["argv"])
        limit_files(resource.RLIM_INFINITY)
        FAULT.clear()
        sys.modules.pop("matplotlib", None)
        print(json.dumps(result), flush=True)
