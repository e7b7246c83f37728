"""The site: `pip install -e ".[docs]" && sphinx-build -W docs docs/_build`."""

import importlib.metadata

project = "hyperjax"
copyright = "the hyperjax authors, Apache-2.0"
release = importlib.metadata.version("hyperjax")

extensions = ["myst_nb"]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # pytest runs the code on these pages: tests/test_docs.py

html_theme = "alabaster"
html_title = f"{project} {release}"
html_theme_options = {
    "description": "Differentiable tuning in JAX",
    "page_width": "1100px",
    "sidebar_width": "200px",
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
