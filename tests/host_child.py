"""One of several processes that run a command as one, with a fault on its way.

`python host_child.py FAULT ARGV...`: FAULT is a JSON object as in cli_child.py, or "{}".
"""

import json
import sys
from typing import Any

from cli_child import FAULT, watch

if __name__ == "__main__":
    absent: Any = None
    sys.modules["matplotlib"] = absent  # as if it were not installed, which is faster
    sys.addaudithook(watch)
    FAULT.update(json.loads(sys.argv[1]))

    from hyperjax.app import main

    raise SystemExit(main(sys.argv[2:]))
