"""Configuration of Sphinx."""

import importlib.metadata
import os
import urllib.request
from typing import Any

import pyro.infer
from sphinx.application import Sphinx

project = "pyro_shortrun"
author = "the pyro_shortrun contributors"
copyright = f"2026, {author}"
release = importlib.metadata.version("pyro-shortrun")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

html_theme = "furo"
html_title = project

# Links into the documentation of those that answer. Without the network the build is the same but for these.
SITES = {
    "arviz": "https://python.arviz.org/en/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=3):
            return True
    except OSError:
        return False


intersphinx_mapping = {}
if os.environ.get("DOCS_INTERSPHINX") != "0":
    intersphinx_mapping = {name: (url, None) for name, url in SITES.items() if answers(url)}


def found_elsewhere(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Pyro documents classes under the modules that define them, but AutoGuides where they are exported; short names in
    our docstrings may be those of another of our modules."""
    target = node.get("reftarget") or ""
    module, _, name = target.rpartition(".")
    if module == "pyro.infer" and hasattr(pyro.infer, name):
        node["reftarget"] = f"{getattr(pyro.infer, name).__module__}.{name}"
    elif module == "pyro.infer.autoguide.guides":
        node["reftarget"] = f"pyro.infer.autoguide.{name}"
    elif not module and node.get("refdomain") == "py" and node["reftype"] in ("class", "func"):
        node["refspecific"] = True
        return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, content)
    return None


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", found_elsewhere, priority=400)  # before intersphinx looks
