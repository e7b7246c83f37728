"""Writes the pages of the API reference: one per public module, from signatures and docstrings.

`conf.py` calls `write` before each build. A name belongs to the module whose `__init__` gives it
its public path. Below its page the names stand by the file that defines them, under the first line
of that file's docstring; fields of a NamedTuple stand as in the source, with their comments.
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MODULES = (
    "hyperjax",
    "hyperjax.linsolve",
    "hyperjax.prox",
    "hyperjax.guarded",
    "hyperjax.online",
    "hyperjax.evolution",
    "hyperjax.hypernet",
    "hyperjax.hypernet.nnx",
    "hyperjax.hypernet.linen",
    "hyperjax.layers",
    "hyperjax.bilevel",
    "hyperjax.continual",
    "hyperjax.exchange",
    "hyperjax.search",
    "hyperjax.merge",
    "hyperjax.protocol",
    "hyperjax.kernels",
    "hyperjax.tasks",
    "hyperjax.app",
)
FENCE = "`" * 5


class Name(NamedTuple):
    path: str  # "hyperjax.linsolve.cg"
    value: Any
    home: ModuleType  # the file that defines it
    node: ast.AST  # its definition there


def write(folder: Path) -> None:
    """`<module>.md` for each, and `index.md`; a page that would not change is left alone."""
    folder.mkdir(exist_ok=True)
    rows = []
    for module in MODULES:
        update(folder / f"{module}.md", page(module))
        rows.append(f"| [`{module}`]({module}.md) | {_title(importlib.import_module(module))} |")
    listed = "\n".join(MODULES)
    update(
        folder / "index.md",
        "# API reference\n\nEvery public name, from its docstring.\n\n| module | |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n",
    )


def update(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def names(module: str) -> Iterator[Name]:
    """The public names of a module, in the order of its source."""
    loaded = importlib.import_module(module)
    package = hasattr(loaded, "__path__")
    for name, node, home in _imported(loaded) if package else _defined(loaded):
        if not name.startswith("_"):
            yield Name(f"{module}.{name}", getattr(loaded, name), home, node)


def _imported(package: ModuleType) -> Iterator[tuple[str, ast.AST, ModuleType]]:
    """`from ._file import name as name` in an `__init__`; not subpackages, which have pages."""
    for line in _tree(package).body:
        if isinstance(line, ast.ImportFrom):
            home = importlib.import_module("." * line.level + (line.module or ""), package.__name__)
            for alias in line.names:
                if not inspect.ismodule(getattr(package, alias.asname or alias.name)):
                    yield alias.asname or alias.name, *_definition(home, alias.name)


def _definition(home: ModuleType, name: str) -> tuple[ast.AST, ModuleType]:
    """Where the file defines a name, or the file that it has it from."""
    for found, node, _ in _defined(home):
        if found == name:
            return node, home
    for line in _tree(home).body:
        if isinstance(line, ast.ImportFrom) and name in (a.asname or a.name for a in line.names):
            start = home.__name__ if hasattr(home, "__path__") else home.__package__
            source = "." * line.level + (line.module or "")
            return _definition(importlib.import_module(source, start), name)
    raise LookupError(f"{home.__name__} does not define {name}")


def _defined(module: ModuleType) -> Iterator[tuple[str, ast.AST, ModuleType]]:
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node, module
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node, module) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node, module


@functools.cache
def _source(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")


@functools.cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(_source(module))


def documentation(name: Name) -> str:
    """The docstring; of an alias, the comment above it."""
    if isinstance(name.node, ast.FunctionDef | ast.ClassDef):
        return ast.get_docstring(name.node) or ""
    lines, row = _source(name.home).splitlines(), name.node.lineno - 2
    above = []
    while row >= 0 and lines[row].startswith("#"):
        above.insert(0, lines[row].lstrip("# "))
        row -= 1
    inline = lines[name.node.lineno - 1].partition("  # ")[2]
    return "\n".join(above) or inline


# ---- pages --------------------------------------------------------------------------------------


def page(module: str) -> str:
    loaded = importlib.import_module(module)
    parts = [f"# {module}", f"```{{py:module}} {module}\n```"]
    parts.append(markdown(inspect.getdoc(loaded) or ""))
    home = None
    for name in sorted(names(module), key=lambda n: n.home.__name__):
        if name.home is not home and name.home is not loaded:
            parts.append(f"## {_title(name.home)}")
        home = name.home
        parts.append(entry(name))
    return "\n\n".join(parts) + "\n"


def _title(module: ModuleType) -> str:
    first = (inspect.getdoc(module) or module.__name__).split("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def entry(name: Name) -> str:
    node, text = name.node, markdown(documentation(name))
    short = name.path.rpartition(".")[2]  # Sphinx puts the module in front
    where = f"*Defined in* `{name.home.__name__}`."
    if isinstance(node, ast.FunctionDef):
        return _directive("function", f"{short}{signature(node)}", f"{text}\n\n{where}")
    if isinstance(node, ast.ClassDef):
        parts = [text, fields(name), *_methods(node), where]
        return _directive("class", short, "\n\n".join(p for p in parts if p))
    lines = (ast.get_source_segment(_source(name.home), node) or "").splitlines()
    definition = f"```python\n{lines[0]}{' ...' if len(lines) > 1 else ''}\n```"
    return _directive("data", short, f"{definition}\n\n{text}\n\n{where}")


def _directive(kind: str, head: str, body: str, fence: str = FENCE) -> str:
    return f"{fence}{{py:{kind}}} {head}\n\n{body}\n{fence}"


def signature(node: ast.FunctionDef) -> str:
    """As written, but for `self`."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^self(, (?!/)|, /, |$)", "", arguments)
    return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def fields(name: Name) -> str:
    """The fields of a class in a block of code, with the comments in the source."""
    assert isinstance(name.node, ast.ClassDef)
    body = [n for n in name.node.body if isinstance(n, ast.AnnAssign)]
    if not body:
        return ""
    lines = _source(name.home).splitlines()
    first, last = body[0].lineno - 1, max(n.end_lineno or n.lineno for n in body)
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    shown = textwrap.dedent("\n".join(lines[first:last]))
    return f"```python\n{shown}\n```"


def _methods(node: ast.ClassDef) -> Iterator[str]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
            text = markdown(ast.get_docstring(method) or "")
            if text and not method.name.startswith("_"):
                kind = "property" if _is_property(method) else "method"
                head = method.name if kind == "property" else method.name + signature(method)
                yield _directive(kind, head, text, FENCE[:4])


def _is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


def markdown(docstring: str) -> str:
    """Docstrings are Markdown but for `Args:` and what is in angle brackets."""
    lines: list[str] = []
    arguments = False
    for line in docstring.splitlines():
        if line in ("Args:", "Returns:", "Attributes:"):
            lines += [f"**{line.rstrip(':')}**", ""]
            arguments = True
            continue
        if line and not line.startswith(" "):
            arguments = False
        if arguments and (match := re.match(r"  (\S[^:]*): ?(.*)", line)):
            quoted = ", ".join(f"`{n.strip('`')}`" for n in match[1].split(", "))
            line = f"- {quoted}: {match[2]}"
        elif arguments:
            line = line[2:]
        lines.append(line)
    return _doctests("\n".join(lines))


def _doctests(text: str) -> str:
    """Examples with prompts become blocks."""
    return re.sub(r"(?m)(^>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", text)
