"""Configuration of Sphinx."""

import importlib.metadata
import os

project = "pyro_shortrun"
author = "the pyro_shortrun contributors"
copyright = f"2026, {author}"
release = importlib.metadata.version("pyro-shortrun")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "off"

html_theme = "furo"
html_title = project

# Links into other projects' documentation need the network: only with DOCS_INTERSPHINX=1.
if os.environ.get("DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "pyro": ("https://docs.pyro.ai/en/stable/", None),
        "python": ("https://docs.python.org/3/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
