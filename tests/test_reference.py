"""Every public name is in the reference, with a docstring that says what it raises."""

import ast
import doctest
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import reference  # noqa: E402

# A docstring that names its errors, says what is refused, or sends the reader to one that does.
TOLD = re.compile(r"[Rr]aise|[Ee]rror|[Rr]efuse|NaN|[Ss]ee `|[Aa]s `|those of `|that of `")


def by_module():
    return pytest.mark.parametrize("module", reference.MODULES)


def test_every_public_package_has_a_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) <= set(reference.MODULES)


@by_module()
def test_every_public_name_is_there_once(module):
    loaded = importlib.import_module(module)
    public = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    if not hasattr(loaded, "__path__"):  # a file also has the names that it imports
        public &= {name for name, _, _ in reference._defined(loaded)}
    found = [name.path.rpartition(".")[2] for name in reference.names(module)]
    assert sorted(found) == sorted(public)


@by_module()
def test_every_public_name_is_documented(module):
    bare = [name.path for name in reference.names(module) if not reference.documentation(name)]
    assert bare == []


@by_module()
def test_docstrings_say_what_raises(module):
    silent = [
        name.path
        for name in reference.names(module)
        if isinstance(name.node, ast.FunctionDef)
        and raises(name.node)
        and not TOLD.search(reference.documentation(name))
    ]
    assert silent == []


def raises(function: ast.FunctionDef) -> bool:
    """Whether it raises, or checks by one of the functions that do, in its own body."""
    for node in ast.walk(function):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Raise) or re.match(r"_?checks?\.|_check", called):
            return True
    return False


@by_module()
def test_examples_in_docstrings_run(module):
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for name in reference.names(module):
        text = reference.documentation(name)
        if ">>>" in text:
            report = []
            runner.run(parser.get_doctest(text, {}, name.path, None, 0), out=report.append)
            assert report == []


def test_a_page_shows_signature_fields_and_arguments():
    page = reference.page("hyperjax.linsolve")
    assert "{py:function} cg(*, maxiter: int" in page and "- `maxiter`: most products" in page
    page = reference.page("hyperjax")
    assert "{py:class} Split" in page and "train: Batches  # leaves [steps, ...]" in page
    assert "{py:method} constrain(" in page and "constrain(self" not in page


def test_docstrings_become_markdown():
    text = "Title.\n\nArgs:\n  a, b: one\n    more\n  c: two\n\nRaises X.\n\n>>> 1 + 1\n2"
    assert reference.markdown(text) == (
        "Title.\n\n**Args**\n\n- `a`, `b`: one\n  more\n- `c`: two\n\nRaises X.\n\n"
        "```pycon\n>>> 1 + 1\n2\n```"
    )
