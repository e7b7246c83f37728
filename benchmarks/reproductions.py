"""The table of reproductions, from the committed records: papers' numbers, ours, and a verdict.

    python benchmarks/reproductions.py

Writes docs/reproductions.md and the short table of the README; a test fails when either is stale.
A second to run: nothing is measured. The rows are in `_reproduction_rows.py`; records of notebooks
bring their own, with paper, rule and verdict.

A verdict counts comparisons of the numbers in a record, which stand in the row and were fixed as
targets before or with the benchmark: all hold, "reproduced"; some, "partly", and those that do not
hold are named; none, "not". It judges the claim in our setting, which is smaller than the paper's
unless the row says that it is the same.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import _measure
from _reproduction_rows import OWN, ROWS, Row

PAGE = _measure.ROOT / "docs" / "reproductions.md"
README = _measure.ROOT / "README.md"
BEGIN, END = "<!-- {}:begin", "<!-- {}:end -->"
FOLDERS = {"benchmarks": _measure.RESULTS, "notebooks": _measure.ROOT / "notebooks" / "results"}


def main() -> None:
    for page in (PAGE, README):
        page.write_text(with_tables(page))


# ---- numbers ------------------------------------------------------------------------------------


def record(name: str) -> dict[str, Any]:
    folder, _, stem = name.partition("/")
    return json.loads((FOLDERS[folder] / f"{stem}.json").read_text())


def at(data: Any, path: str) -> Any:
    """What a path leads to; see `_reproduction_rows`."""
    step, _, rest = path.partition("/")
    if not path:
        return data["mean"] if isinstance(data, dict) and "mean" in data else _number(data)
    if step == "*":
        return [at(v, rest) for v in (data.values() if isinstance(data, dict) else data)]
    if isinstance(data, dict):
        return at(data[step], rest)
    key, equals, value = step.partition("=")
    if equals:
        (found,) = [v for v in data if str(v[key]) == value]
        return at(found, rest)
    return at(data[int(step)], rest)


def _number(value: Any) -> Any:
    """JSON has null for what was not finite; comparisons with NaN are false."""
    if isinstance(value, list):
        return [_number(v) for v in value]
    return math.nan if value is None else value


def truths(verdicts: dict[str, Any]) -> list[bool]:
    return [v for v in verdicts.values() if isinstance(v, bool)]


def three(verdicts: dict[str, Any], optimizer: str = "") -> list[bool]:
    """Of the record of MIP: where it takes a third of the steps."""
    return [v for k, v in verdicts.items() if ">= 3 times" in k and optimizer in k]


def wins(ours: list[float], theirs: list[float]) -> int:
    return sum(a < b for a, b in zip(ours, theirs, strict=True))


WORDS = {f.__name__: f for f in (all, abs, len, map, max, min, sum, zip, truths, three, wins)}
WORDS |= {"mean": statistics.mean, "median": statistics.median}
WORDS |= {"spread": lambda values: max(values) - min(values)}


def numbers(row: Row) -> dict[str, Any]:
    data = record(row.record)
    return {name: at(data, path) for name, path in row.numbers.items()}


def compute(expression: str, found: dict[str, Any]) -> Any:
    return eval(expression, {"__builtins__": {}, **WORDS, **found})


def shown(row: Row, found: dict[str, Any]) -> str:
    """`row.shown` as an f-string of the numbers."""
    return compute(f"f{row.shown!r}", found)


def verdict(row: Row, found: dict[str, Any]) -> tuple[str, list[str]]:
    """In a word, and what does not hold."""
    missed = [words for words, test in row.holds.items() if not compute(test, found)]
    if not missed:
        return "reproduced", []
    return ("not" if len(missed) == len(row.holds) else "partly"), missed


# ---- the table ----------------------------------------------------------------------------------


def with_tables(page: Path) -> str:
    """The page with the tables between their marks; the one of the README is short."""
    text = _put(page.read_text(), "reproductions", markdown(short=page == README))
    return text if page == README else _put(text, "notebooks", notebooks())


def _put(page: str, name: str, table: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = page.split(begin, 1)
    mark, rest = rest.split("\n", 1)
    return f"{before}{begin}{mark}\n{table}{end}{rest.split(end, 1)[1]}"


def notebooks() -> str:
    """What the full settings of the notebooks have left: verdicts by their own rules."""
    lines = ["| notebook | paper | rule | verdict | full setting |", "|---|---|---|---|---|"]
    for path in sorted(FOLDERS["notebooks"].glob("*.json")):
        data = json.loads(path.read_text())
        script = _measure.ROOT / "notebooks" / f"{path.stem}.py"
        title = re.search(r"^# # (.+)$", script.read_text(), re.M)
        paper, verdict = _told(data["paper"]), data["verdict"]
        if paper.startswith(("no paper", "none")) and verdict == "reproduced":
            verdict = "holds"  # there is nothing to reproduce
        cells = [
            title[1] if title else path.stem,
            _linked(paper),
            data.get("rule", "the `assert` at its end"),
        ]
        cells += [f"**{verdict}**", f"`python notebooks/{script.name} --full`"]
        cells[-1] += f", {data['seconds']:.0f} s"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _told(paper: Any) -> str:
    """`paper` of a record, a sentence or a tree of them, in one line."""
    if isinstance(paper, dict):
        return "; ".join(f"{name}: {_told(value)}" for name, value in paper.items())
    if isinstance(paper, list):
        return ", ".join(map(_told, paper))
    return f"{paper:.4g}" if isinstance(paper, float) else str(paper)


def markdown(short: bool) -> str:
    rows = [row for row in ROWS if row.short or not short]
    header = "| paper | claim | theirs | ours | verdict |" + ("" if short else " command |")
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    lines += [_line(row, short) for row in rows]
    return "\n".join([*lines, "", counts(), ""])


def counts() -> str:
    found = [verdict(row, numbers(row))[0] for row in ROWS]
    count = lambda word: found.count(word)
    return (
        f"All {len(ROWS)} rows: {count('reproduced')} reproduced, {count('partly')} partly, "
        f"{count('not')} not."
    )


def _line(row: Row, short: bool) -> str:
    found = numbers(row)
    word, missed = verdict(row, found)
    held = [words for words in row.holds if words not in missed]
    if short:
        told = f"**{word}**" + (f"; missed: {', '.join(missed)}" if missed else "") + _of(row.paper)
        cells = [_linked(row.paper), row.claim, row.theirs, f"{shown(row, found)} ({row.setting})"]
        return f"| {' | '.join([*cells, told])} |"
    told = f"**{word}**."
    told += f" Held: {', '.join(held)}." if held else ""
    told += f" Missed: {', '.join(missed)}." if missed else ""
    ours = f"{shown(row, found)}. {row.setting[0].upper()}{row.setting[1:]}"
    cells = [_linked(row.paper), row.claim, row.theirs, ours, told, f"`{command(row)}`"]
    return f"| {' | '.join(cells)} |"


def _of(paper: str) -> str:
    """How the other rows of this paper ended, so that no single one stands for it."""
    found = [verdict(row, numbers(row))[0] for row in ROWS if row.paper == paper]
    if len(found) == 1:
        return ""
    ends = [f"{found.count(word)} {word}" for word in ("reproduced", "partly", "not")]
    return f"; its {len(found)} rows: {', '.join(e for e in ends if not e.startswith('0'))}"


def _linked(paper: str) -> str:
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", paper)


def command(row: Row) -> str:
    """As the program that made the record begins its docstring."""
    folder, _, stem = row.record.partition("/")
    program = _program(_measure.ROOT / folder, stem)
    usual = " --full" if folder == "notebooks" else ""
    if not usual and "--data-dir DIR" in program.read_text():
        usual = " --data-dir DIR"
    options = f" {row.options}".rstrip() if row.options else usual
    return f"python {folder}/{program.name}{options}"


def _program(folder: Path, stem: str) -> Path:
    """The longest program that a record is named after: unem.py for unem_digits.json."""
    named = [p for p in folder.glob("*.py") if stem == p.stem or stem.startswith(p.stem + "_")]
    if not named:  # continual_digits of continual_hypernets.py
        named = [p for p in folder.glob("*.py") if p.stem.startswith(stem.split("_")[0] + "_")]
    return max(named, key=lambda p: len(p.stem))


def unaccounted() -> list[str]:
    """Records of benchmarks that have neither a row nor a place among our own."""
    rowed = {row.record.partition("/")[2] for row in ROWS}
    found = [path.stem for path in sorted(FOLDERS["benchmarks"].glob("*.json"))]
    return [name for name in found if name not in rowed | set(OWN)]


if __name__ == "__main__":
    main()
