"""Writes ``report.html``: one page that needs no network, no script and no second file."""

import base64
import io
import json
import os
import shlex
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import _plots_data as data
from . import _tables as tables
from ._record import Record

BUDGET = 1_000_000  # bytes of the whole page: small enough for any mail or issue tracker
_TEXT_BUDGET = 250_000
_MAX_LISTED = 20
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ddd; --page: #fff;
  --card: #f6f6f6; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #aaa; --line: #3a3a3a;
  --page: #17191c; --card: #22252a; --mark: #56b4e9; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.soft, figcaption { color: var(--soft); } figcaption { font-size: .9rem; }
.headline { font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .2rem 0 .2rem .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .left td, .left th { text-align: left; }
.left td:last-child { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.6rem; } img { width: 100%; height: auto; background: #fff;
  border-radius: 6px; border: 1px solid var(--line); box-sizing: border-box; }
pre { background: var(--card); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table, pre { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
# File stem -> title and what the reader should take from the picture.
_FIGURES = {
    "history": (
        "Validation loss",
        "Left: every member, and in bold the best final member of each seed along its line of"
        " ancestors. Right: the smallest loss of any member so far. It is a minimum over noisy"
        " evaluations; the table above has the test set.",
    ),
    "hparams": (
        "Hyperparameters during training",
        "Thin: every slot of the population. Bold: the schedule that trained the best member of"
        " each seed, followed through the exchanges. Of many hyperparameters it shows those that"
        " go most with the final loss.",
    ),
    "table": ("On the test set", "Each dot is one seed."),
    "sensitivity": (
        "Which hyperparameters go with the final loss",
        "Rank correlation between final value and final validation loss, within seeds. It finds"
        " monotone relations only, and one that all members agree on by now correlates with"
        " nothing. Copies count as independent members, so after many exchanges the error bars"
        " are too short.",
    ),
    "parallel": (
        "Final hyperparameters",
        "One line per member, dark for a low loss. The numbers at the ends are the smallest and"
        " the largest final value. Of many hyperparameters it shows those that go most with the"
        " final loss.",
    ),
    "lineage": (
        "Who copied whom",
        "First seed only. Coloured lines lead to the final members; other slots' states died out.",
    ),
}


def write_report(record: Record, plots: Sequence[Path], folder: Path) -> Path:
    """Writes ``folder/report.html`` and returns its path.

    The page embeds the plots and stays below 1 MB: pictures that would not fit are stored with
    fewer colours, and at the worst left out by name.

    Args:
        record: the run.
        plots: PNG files, as `draw_plots` returns them; may be empty.
        folder: where to write; the run folder.
    """
    path = Path(folder) / "report.html"
    title = " · ".join(str(record.config[k]) for k in ("task", "method") if record.config.get(k))
    sections = [
        _header(record, title or record.folder.name),
        _results(record),
        _figures(plots),
        _best(record),
        _events(record),
        _again(record),
        _listing("Configuration", record.config),
        _listing("Environment", record.env),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – hyperjax report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _header(record: Record, title: str) -> str:
    config = record.config
    done = any(event.get("event") == "done" for event in record.events)
    facts = [f"{record.members:,} members", f"{len(record.seeds):,} seeds"]
    if len(record.steps):
        facts.append(f"{record.inner_steps[-1]:,} inner steps per member")
    facts.append(f"hyperjax {config.get('hyperjax', '(unknown version)')}")
    facts += [] if done else ["not finished"]
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f'<p class="soft">{escape(" · ".join(facts))}</p>\n'
        f'<p class="headline">{escape(tables.headline(record.table))}</p>\n</header>\n'
    )


def _results(record: Record) -> str:
    body = ""
    if record.missing:
        missing = ", ".join(record.missing)
        body = f'<p class="soft">Not in this folder, so not shown: {escape(missing)}.</p>\n'
    if record.table is not None:
        header, cells = tables.header_and_cells(record.table)
        rows = tables.summarise(record.table)
        if any(row.difference for row in rows):
            header = [*header, "test loss − random"]
            extra = [tables.show(row.difference.get("test_loss"), sign=True) for row in rows]
            cells = [[*cell, more] for cell, more in zip(cells, extra, strict=True)]
        notes = "".join(f"<li>{escape(n)}</li>" for n in tables.footnotes(record.table))
        body += f'{_table(header, cells)}<ul class="soft">{notes}</ul>\n'
    return _section("Results", body)


def _figures(plots: Sequence[Path]) -> str:
    body = ""
    images = [path.read_bytes() for path in plots]
    limit = _limit([len(image) for image in images])
    for path, image in zip(plots, images, strict=True):
        title, caption = _FIGURES.get(path.stem, (path.stem, ""))
        image = _shrunk(image, limit)
        body += f"<h3>{escape(title)}</h3>\n"
        if image is None:
            body += f"<p>Too large to embed: see plots/{escape(path.name)}.</p>\n"
            continue
        code = base64.b64encode(image).decode("ascii")
        width, height = struct.unpack(">II", image[16:24])
        body += (
            f'<figure><img src="data:image/png;base64,{code}"'
            f' alt="{escape(f"Plot: {title}. {caption}")}" width="{width}" height="{height}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        )
    return _section("Plots", body or "<p>No plots were drawn.</p>\n")


def _limit(sizes: list[int]) -> int:
    """The size to cut pictures down to so that all fit; small ones leave more to the others."""
    left = (BUDGET - _TEXT_BUDGET) * 3 // 4  # base64 takes four bytes for three
    for i, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - i)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def _shrunk(image: bytes, limit: int) -> bytes | None:
    """The picture in at most ``limit`` bytes: with fewer colours, then smaller, then not at all."""
    if len(image) <= limit:
        return image
    try:
        from PIL import Image
    except ImportError:
        return None
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    for colours, factor in ((128, 1.0), (32, 1.0), (32, 0.75), (16, 0.5)):
        size = (round(picture.width * factor), round(picture.height * factor))
        small = picture.resize(size).quantize(colours, Image.Quantize.FASTOCTREE)
        stored = io.BytesIO()
        small.save(stored, format="PNG", optimize=True)
        if stored.tell() <= limit:
            return stored.getvalue()
    return None


def _best(record: Record) -> str:
    seeds = (record.best or {}).get("seeds", [])
    if not seeds:
        return _section("Best hyperparameters", "<p>Not there yet: best.json is written late.</p>")
    names = list(seeds[0].get("hparams", {}))
    header = ["", *(f"seed {s['seed']}" for s in seeds), "from", "to", "scale"]
    cells = [["member", *(str(s["member"]) for s in seeds), "", "", ""]]
    cells.append(["validation loss", *(_figure(s.get("valid")) for s in seeds), "", "", ""])
    shown = names if len(names) <= 200 else list(data.ranking(record))[:200]
    for name in shown:
        bound = record.space.get(name, {})
        values = [_figure(s.get("hparams", {}).get(name)) for s in seeds]
        ends = (_figure(bound.get("low")), _figure(bound.get("high")))
        cells.append([name, *values, *ends, str(bound.get("scale", ""))])
    more = "" if shown is names else f"<p>The first 200 of {len(names):,} by rank correlation.</p>"
    note = (
        '<p class="soft">Values at the end of training. The whole schedule is in schedule.npz;'
        " <code>hyperjax replay</code> trains with it.</p>\n"
    )
    return _section("Best hyperparameters", _table(header, cells) + more + note)


def _events(record: Record) -> str:
    counts = Counter(str(event.get("event", "?")) for event in record.events)
    if not counts:
        return _section("Events", "<p>None were logged.</p>")
    times = [str(event["time"]) for event in record.events if event.get("time")]
    body = f"<p>From {escape(times[0])} to {escape(times[-1])}.</p>\n" if times else ""
    body += _table(["event", "count"], [[k, f"{n:,}"] for k, n in counts.most_common()])
    lost = [event for event in record.events if event.get("event") == "quarantine"]
    if lost:
        keys = ("step", "seed", "member", "parent", "reason")
        cells = [[str(event.get(k, "")) for k in keys] for event in lost[:_MAX_LISTED]]
        more = f" (the first {_MAX_LISTED} of {len(lost):,})" if len(lost) > _MAX_LISTED else ""
        body += f"<h3>Members taken out and reseeded{more}</h3>\n{_table(keys, cells)}"
    return _section("Events", body)


def _again(record: Record) -> str:
    run = shlex.quote(_shown(record.folder))
    member = next(iter(data.best_members(record).values()), 0) if len(record.steps) else 0
    lines = [
        f"hyperjax replay {run} --member {member}   # train again with this member's schedule",
        f"hyperjax resume {run}   # go on from the last checkpoint",
    ]
    return _section("Replay and resume", f"<pre>{escape(chr(10).join(lines))}</pre>\n")


def _shown(folder: Path) -> str:
    """The folder as typed from here; a page that is passed on must not tell who made it."""
    relative = os.path.relpath(folder)
    return folder.resolve().name if relative.startswith((os.pardir, os.sep)) else relative


def _listing(title: str, values: dict[str, Any]) -> str:
    if not values:
        return _section(title, "<p>Not recorded.</p>")
    cells = [[str(k), _plain(v)] for k, v in values.items()]
    return _section(title, _table(["key", "value"], cells, left=True))


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 2000 else f"{text[:2000]}… ({len(text):,} characters)"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], *, left: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n'
    kind = ' class="left"' if left else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
