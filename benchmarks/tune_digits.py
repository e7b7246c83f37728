"""The README's first command, kept as JSON; it also writes the README's table and picture.

    python benchmarks/tune_digits.py [RUN]

Without RUN it tunes digits anew, with an empty compilation cache: 30 s of run time on two free
cores, and as much again to compile and draw. Expected over 5 seeds: test loss of the tuned run
about half of random search's at equal training steps, and below Optuna's TPE. Needs the extras
`demo` and `optuna`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tune_digits.json"
PICTURE = ROOT / "docs" / "images" / "tune_digits.png"
BEGIN, END = "<!-- table:begin", "<!-- table:end -->"


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else tune()
    table = json.loads((run / "table.json").read_text())
    env = json.loads((run / "env.json").read_text())
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    RESULT.write_text(json.dumps({"commit": commit, "env": env, **table}, indent=1) + "\n")
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copy(run / "plots" / "history.png", PICTURE)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), json.loads(RESULT.read_text())))


def tune() -> Path:
    folder = Path(tempfile.mkdtemp())
    cold = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = ["hyperjax", "tune", "digits", "--out", str(folder / "digits")]
    subprocess.run(command, check=True, env=cold)
    return folder / "digits"


def with_table(readme: str, result: dict) -> str:
    """The README with the table of `result` between its two marks."""
    before, rest = readme.split(BEGIN, 1)
    mark, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{mark}\n{markdown(result)}{END}{after}"


def markdown(result: dict) -> str:
    """Mean and standard error over seeds, and the paired difference to random search."""
    rows = {row["key"]: row for row in result["rows"]}
    seeds = len(rows["tuned"]["test_loss"])
    lines = [
        f"| over {seeds} seeds | test loss | less than random search | test accuracy | "
        "training steps per seed | compile + run |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        less = np.subtract(rows["random"]["test_loss"], row["test_loss"])
        difference = "" if key == "random" else spread(less)
        seconds = f"{row['compile_s']:.0f} + {row['run_s']:.0f} s"
        lines.append(
            f"| {row['name']} | {spread(row['test_loss'])} | {difference} | "
            f"{spread(row['test_accuracy'])} | {row['inner_steps']:,} | {seconds} |"
        )
    cores, machine = result["env"]["cores"], result["env"]["backend"].upper()
    lines.append(f"\nMean ± standard error; {cores} {machine} cores, JAX {result['env']['jax']}.")
    return "\n".join(lines) + "\n"


def spread(values) -> str:
    values = np.asarray(values)
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
