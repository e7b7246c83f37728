"""README and docs do what they say: code runs, commands exist, links lead somewhere."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from hyperjax.app import main
from hyperjax.app._cli import _parser

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import reference  # noqa: E402

RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # code and commands
LINKED = [*RUN, *(p for p in sorted(ROOT.glob("*.md")) if p not in RUN)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FENCE = re.compile(r"^( *)(```+|~~~+)([^\n`]*)\n(.*?)^\1\2 *$", re.M | re.S)
LANGUAGES = {
    "python",
    "bash",
    "console",
    "text",
    "yaml",
    "json",
    "toml",
    "{toctree}",
    "{include}",
    "",
}

# Runs the blocks of each page as they stand, in a namespace of its own, under its own line numbers.
DRIVER = """
import json, sys
for name, blocks in json.load(sys.stdin):
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        exec(compile("\\n" * line + code, name, "exec"), namespace)
"""


class Block(NamedTuple):
    language: str
    code: str
    line: int  # lines of the page above the code


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    return [
        Block(
            (m[3].split() or [""])[0],
            textwrap.dedent(m[4]),
            text.count("\n", 0, m.start(4)),
        )
        for m in FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return FENCE.sub("", text)


def pages(*paths: Path):
    return pytest.mark.parametrize("page", paths, ids=lambda p: str(p.relative_to(ROOT)))


# ------------------------------------------------------------------------------------ code


@pages(*LINKED)
def test_blocks_are_closed_and_have_a_known_language(page):
    """So that a block of Python under another name does not escape the next test."""
    text = read(page)
    assert {b.language for b in blocks(text)} <= LANGUAGES
    assert "```" not in prose(text) and "~~~" not in prose(text)


def together() -> list[tuple[Path, ...]]:
    """Pages that share a process, since most of their time is JAX getting started.

    One that configures JAX has a process to itself; the others have two, for two workers.
    """
    code = {page: [b.code for b in blocks(read(page)) if b.language == "python"] for page in RUN}
    alone = [page for page in RUN if any("jax.config.update" in block for block in code[page])]
    rest = [page for page in RUN if code[page] and page not in alone]
    return [*((page,) for page in alone), tuple(rest[::2]), tuple(rest[1::2])]


@pytest.mark.parametrize("several", together(), ids=lambda pages: "+".join(p.stem for p in pages))
def test_python_runs_as_it_stands(several, tmp_path):
    """In a new process, since a reader has neither float64 nor eight devices switched on.

    With the quick compiler of conftest.py: pages wait for it, and for little else.
    """
    code = [(p.name, python(read(p))) for p in several]
    result = in_new_process(code, tmp_path)
    assert result.returncode == 0, result.stderr


def python(text: str) -> list[tuple[int, str]]:
    return [(b.line, b.code) for b in blocks(text) if b.language == "python"]


def in_new_process(code: list[tuple[str, list[tuple[int, str]]]], folder: Path):
    settings = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER],
        input=json.dumps(code),
        env=settings | {"JAX_PLATFORMS": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_a_fault_in_a_block_is_found_at_its_line(tmp_path):
    text = "# Page\n\n```python\nx = 1\n```\n\n- item\n\n  ```python\n  y = x + z\n  ```\n"
    code = python(text)
    assert code == [(3, "x = 1\n"), (9, "y = x + z\n")]
    result = in_new_process([("good.md", [(0, "z = 1\n")]), ("page.md", code)], tmp_path)
    assert result.returncode == 1
    assert 'File "page.md", line 10' in result.stderr and "NameError" in result.stderr


# -------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """Every command of the bash and console blocks, as words."""
    found = []
    for block in blocks(text):
        if block.language in ("bash", "console"):
            lines = block.code.replace("\\\n", " ").splitlines()
            prompted = [line[2:] for line in lines if line.startswith("$ ")]
            for line in prompted or lines:  # where some lines have a prompt the others are output
                found += split(line)
    return found


def split(line: str) -> list[list[str]]:
    """`a b && c` is [["a", "b"], ["c"]]."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            words.append([])
        else:
            words[-1].append(word)
    return [w for w in words if w]


def check_hyperjax(words: list[str]) -> None:
    assert PROJECT["project"]["scripts"]["hyperjax"] == "hyperjax.app:main"
    try:
        _parser().parse_args(words)
    except SystemExit as stop:
        assert stop.code == 0, words


def check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "uninstall"), words
    for word in words:
        if match := re.search(r"\[([\w, -]+)\]$", word):
            names = {name.strip() for name in match[1].split(",")}
            assert names <= set(PROJECT["project"]["optional-dependencies"]), word
    if "--group" in words:
        assert words[words.index("--group") + 1] in PROJECT["dependency-groups"], words


def check_paths(words: list[str]) -> None:
    """Of python, pytest and the like: every file that they are given is there."""
    for word in words:
        if not word.startswith("-") and (word.endswith((".py", ".md")) or "/" in word):
            assert (ROOT / word).exists() or "_build" in word, word


CHECKS = {
    "hyperjax": check_hyperjax,
    "pip": check_pip,
    "python": check_paths,
    "pytest": check_paths,
    "jupytext": check_paths,
    "sphinx-build": check_paths,
}
UNCHECKED = {"git", "cd", "mkdir", ".", "source", "export"}


def check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # settings in front of a command
        words = words[1:]
    if words and words[0] not in UNCHECKED:
        assert words[0] in CHECKS, f"nothing is known about the command {words[0]!r}"
        CHECKS[words[0]](words[1:])


@pages(*RUN)
def test_commands_exist(page):
    for words in commands(read(page)):
        check_command(words)


@pages(*RUN)
def test_commands_in_the_text_exist(page):
    """`hyperjax resume RUN` within a sentence: the verb exists. `pip install ...`: as above."""
    for words in map(str.split, re.findall(r"`((?:hyperjax|pip) [^`]+)`", prose(read(page)))):
        if words[0] == "pip":
            check_pip(words[1:])
        elif not words[1].startswith("-"):
            check_verb(words[1])


def check_verb(name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0, name


@pytest.mark.parametrize(
    "line",
    [
        "hyperjax tone digits",
        "hyperjax tune digits --no-such-option",
        "hyperjx tune digits",
        'pip install -e ".[dema]"',
        "pip install -e . --group prod",
        "python notebooks/no_such_page.py",
        'pip install -e ".[demo]" && hyperjax tone digits',
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    found = commands(f"```bash\n{line}\n```\n")
    with pytest.raises(AssertionError):
        for words in found:
            check_command(words)


# ----------------------------------------------------------------------------------- links


def links(text: str) -> list[str]:
    text = prose(text)
    markdown = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", re.sub(r"`[^`\n]*`", "", text))
    return markdown + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken(link: str, page: Path) -> bool:
    if re.match(r"[a-z]+:", link):
        return False  # elsewhere: not looked at, since tests do not use the network
    path, _, anchor = link.partition("#")
    if page.parent == ROOT / "docs" and path.startswith("api/"):  # made when the site is built
        return path not in {f"api/{name}.md" for name in ("index", *reference.MODULES)}
    target = page.parent / path if path else page
    if not target.exists() or not target.resolve().is_relative_to(ROOT.resolve()):
        return True
    return bool(anchor) and target.suffix == ".md" and anchor not in anchors(target)


@pages(*LINKED)
def test_links_lead_somewhere(page):
    assert [link for link in links(read(page)) if broken(link, page)] == []


def test_a_broken_link_is_found():
    page = ROOT / "docs" / "which_method.md"
    text = "[a](transforms.md) [b](no.md) ![c](no.png) [d](#side-by-side) [e](#no) `[f](g)`"
    assert [link for link in links(text) if broken(link, page)] == ["no.md", "no.png", "#no"]
    assert broken("api/hyperjax.none.md", page) and not broken("api/hyperjax.prox.md", page)


def test_every_page_is_in_the_contents():
    """Sphinx says so as well, but it is another stage."""
    listed = {
        line.strip()
        for block in blocks(read(ROOT / "docs" / "index.md"))
        if block.language == "{toctree}"
        for line in block.code.splitlines()
        if line.strip() and not line.startswith(":")
    }
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert listed == pages | {"api/index"}
