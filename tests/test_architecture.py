"""The layout holds: imports go down, the wheel is complete, only the shell touches the world.

Reads the source tree, so it needs a checkout; the rest of the tests also run against a wheel.
"""

import ast
import fnmatch
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import hyperjax

ROOT = Path(__file__).parents[1]

# From the bottom up. A module imports from rows below its own, never from its own row; a name
# without underscore is a subpackage, whose modules may import one another without a cycle.
# `hyperjax` is the package's own `__init__`: only what stands above it may use the public names.
LAYERS = (
    ("kernels",),
    ("_types",),
    ("_checks",),
    ("_tree",),
    ("layers",),
    ("_ranges", "_fan_out", "_fused"),
    (
        "_space",
        "_inner",
        "linsolve",
        "_gaussian_process",
        "guarded",
        "prox",
        "merge",
        "_error_bound",
        "_schedule",
        "_treeverse",
        "_integers",
        "hypernet",
    ),
    ("_fixed_point",),
    ("_unroll", "_implicit", "_proximal", "_reversible", "_best_response"),
    ("_estimators", "online", "evolution", "_forward_sharing", "_training_loss"),
    ("_planned", "_warm_start", "_doubly_robust", "_secant"),
    ("_tuner",),
    ("bilevel", "continual"),
    ("_layout", "_forecast", "_buckets"),
    ("_population",),
    ("search",),
    ("exchange", "protocol"),
    ("hyperjax",),
    ("tasks",),
    ("app",),
)

# The world outside, and who may import the way to it: tasks read data, only the app does the rest.
FILES = {"gzip", "importlib", "io", "os", "pathlib", "urllib", "zipfile"}
SHELL = {"datetime", "logging", "matplotlib", "optuna", "orbax", "rich", "subprocess", "sys"}
SHELL |= {"shutil", "tempfile", "threading", "time", "yaml"}
WRITERS = {"write", "write_bytes", "write_text", "save", "savez", "savetxt", "mkdir", "unlink"}
WRITERS |= {"print", "input"}

# Private or wrong: `check_vma=False` makes gradients through collectives silently false.
PRIVATE = ("jax._src", "jax.core", "jax.interpreters")
UNCHECKED = {"check_vma", "check_rep"}


def sources() -> dict[str, Path]:
    """Every module by the name it is imported under."""
    found = {}
    for folder, prefix in ((ROOT / "hyperjax", "hyperjax"), (ROOT / "kernels", "hyperjax.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def layer(module: str) -> str:
    """`hyperjax.tasks._digits` is in `tasks`, `hyperjax._tree` in `_tree`."""
    return module.split(".")[:2][-1]


def imports(module: str) -> Iterator[str]:
    """Absolute names of what a module imports, wherever in the file, also for types only."""
    package = module.split(".")
    if SOURCES[module].name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                outside = source.split(".")[0] != "hyperjax"
                yield full if full in SOURCES or outside else source


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the last part of the name that is called."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, node
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr, node


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_imports_go_down():
    rank = {name: row for row, names in enumerate(LAYERS) for name in names}
    assert [module for module in SOURCES if layer(module) not in rank] == []
    wrong = [
        f"{module} imports {target}"
        for module in SOURCES
        for target in imports(module)
        if target.split(".")[0] == "hyperjax" and layer(target) != layer(module)
        if rank[layer(target)] >= rank[layer(module)]
    ]
    assert wrong == []


def test_imports_have_no_cycle():
    graph = {
        module: [target for target in imports(module) if target in SOURCES] for module in SOURCES
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_import_jax_only():
    allowed = sys.stdlib_module_names | {"jax"}
    wrong = [
        f"{module} imports {target}"
        for module in SOURCES
        if layer(module) == "kernels"
        for target in imports(module)
        if target.split(".")[0] not in allowed and layer(target) != "kernels"
    ]
    assert wrong == []


def test_init_only_names_what_is_public():
    for module, path in SOURCES.items():
        if path.name != "__init__.py" or module == "hyperjax.kernels":  # that one has a guard
            continue
        for node in TREES[module].body:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1, ast.unparse(node)
                assert all(alias.name == alias.asname for alias in node.names), ast.unparse(node)
            else:
                version = module == "hyperjax" and ast.unparse(node).startswith("__version__ = ")
                assert version or is_docstring(node), f"{path}: {ast.unparse(node)}"


def test_names_and_modules_differ():
    # `hyperjax.x` would be the function or the module, whichever was imported last. Private names
    # never leave their file.
    modules = {part for module in SOURCES for part in module.split(".")}
    wrong = [
        f"{module} defines {node.name}"
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in modules
        if not node.name.startswith("_")
    ]
    assert wrong == []


def test_nothing_private_or_unchecked():
    wrong = []
    for module, tree in TREES.items():
        named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for name in [*imports(module), *named]:
            if any(name == bad or name.startswith(f"{bad}.") for bad in PRIVATE):
                wrong.append(f"{module} uses {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in UNCHECKED:
                wrong.append(f"{module} passes {ast.unparse(node)}")
    assert wrong == []


def test_only_the_shell_touches_the_world():
    wrong = []
    for module in SOURCES:
        if layer(module) == "app":
            continue
        reads = layer(module) == "tasks"
        doors = SHELL if reads else SHELL | FILES
        verbs = WRITERS if reads else WRITERS | {"open"}
        wrong += [f"{module} imports {t}" for t in imports(module) if t.split(".")[0] in doors]
        wrong += [
            f"{module}: {ast.unparse(call)}"
            for name, call in calls(module)
            if name in verbs or (name == "open" and set("wax+") & set("".join(modes(call))))
        ]
    assert wrong == []


def modes(call: ast.Call) -> Iterator[str]:
    """Strings that may be the mode of an `open(file, mode)` or of a `path.open(mode)`."""
    first = 1 if isinstance(call.func, ast.Name) else 0
    values = [*call.args[first:], *(kw.value for kw in call.keywords if kw.arg == "mode")]
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_are_the_folders():
    # The list is written by hand; a folder that is missing from it is left out of the wheel.
    folders = {path.parent for path in SOURCES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    packages = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_data_files_are_packaged():
    patterns = project()["tool"]["setuptools"]["package-data"]
    listed = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, globs in patterns.items()
        for pattern in globs
    ]
    files = [path for path in (ROOT / "hyperjax").rglob("*") if path.is_file()]
    loose = [
        name
        for name in (str(path.relative_to(ROOT)) for path in files)
        if not name.endswith((".py", ".pyc"))
        if not any(fnmatch.fnmatch(name, pattern) for pattern in listed)
    ]
    assert loose == []


def test_version_is_that_of_the_project():
    assert hyperjax.__version__ == project()["project"]["version"]


def test_pallas_is_loaded_by_who_uses_it(tmp_path):
    """It takes a third of the time of importing JAX."""
    code = "import hyperjax, sys; print([name for name in sys.modules if 'pallas' in name])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_kernels_alone_is_refused():
    # The root would otherwise shadow any installed package called `kernels`.
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ImportError: Install hyperjax, then `import hyperjax.kernels`." in done.stderr
