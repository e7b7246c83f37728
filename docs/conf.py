"""The site: `pip install -e ".[docs]" && sphinx-build -W docs docs/_build`.

Two folders are made before each build and ignored by git: `api/` from docstrings, and `notebooks/`
with the scripts of the notebooks, which the site shows as pages without running them.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402

project = "hyperjax"
copyright = "the hyperjax authors, Apache-2.0"
release = importlib.metadata.version("hyperjax")

extensions = ["myst_nb"]
exclude_patterns = ["_build", "*.py", "images"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # pytest runs the code on these pages, CI the notebooks
smartquotes = False  # p'Ap is a product
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
python_maximum_signature_line_length = 88

html_theme = "alabaster"
html_title = f"{project} {release}"
html_theme_options = {
    "description": "Differentiable tuning in JAX",
    "page_width": "1100px",
    "sidebar_width": "220px",
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}


def make_pages(app) -> None:
    reference.write(HERE / "api")
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for script in (HERE.parent / "notebooks").glob("[0-9]*.py"):
        text = script.read_text().replace("](../docs/", "](../")  # links from beside docs/
        text = re.sub(r"\[([^\]\n]+)\]\(\.\./(?!\w+\.md)[^)]*\)", r"\1", text)  # to other folders
        reference.update(folder / script.name, text)


def setup(app) -> None:
    app.connect("builder-inited", make_pages)
