"""Configuration of Sphinx."""

import importlib
import importlib.metadata
import inspect
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

nitpicky = True  # every reference to something of ours leads somewhere
nitpick_ignore = [  # what signatures name and no one needs
    ("py:class", "pyro_shortrun.density.program.Binding"),
    ("py:class", "pyro_shortrun.density.program.Reading"),
    ("py:class", "pyro_shortrun.mcmc.target.Target"),
    ("py:class", "pyro_shortrun.runs.noise.Noise"),
]
nitpick_ignore_regex = [("py:class", r"(?!pyro_shortrun).*|.*\._\w*"), ("py:.*", r"(arviz|pyro|torch)\..*")]

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


def documented(target: str) -> str:
    """Everything of ours is documented once, under its package: ``pyro_shortrun.guides.ShortRunGuide``. Docstrings and
    pages may call it by its name at the top, or by that in its module, as well."""
    module, rest = "pyro_shortrun", target.removeprefix("pyro_shortrun.")
    while rest:
        head, _, tail = rest.partition(".")
        found = getattr(importlib.import_module(module), head, None)
        if not inspect.ismodule(found):
            return ".".join([*getattr(found, "__module__", module).split(".")[:2], rest])
        module, rest = f"{module}.{head}", tail
    return target


def inherited(node: Any) -> list[str]:
    """What a method that a docstring mentions may be called, of the docstring's class and of those it inherits from."""
    owner = getattr(importlib.import_module(node.get("py:module") or "builtins"), node.get("py:class") or "", object)
    ours = [base for base in owner.__mro__ if base.__module__.startswith("pyro_shortrun.")]
    return [documented(f"{base.__module__}.{base.__qualname__}.{node['reftarget']}") for base in ours]


def found_elsewhere(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Where a reference leads that is not the name of an entry. Pyro documents classes under the modules that define
    them, but AutoGuides where they are exported; short names in our docstrings may be of another of our packages."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    module, _, name = target.rpartition(".")
    candidates = []
    if module == "pyro.infer" and hasattr(pyro.infer, name):
        node["reftarget"] = f"{getattr(pyro.infer, name).__module__}.{name}"
    elif module == "pyro.infer.autoguide.guides":
        node["reftarget"] = f"pyro.infer.autoguide.{name}"
    elif target.startswith("pyro_shortrun."):
        candidates = [documented(target)]
    elif not module and node["reftype"] == "meth":
        candidates = inherited(node)
    elif node["reftype"] in ("class", "func", "meth"):
        node["refspecific"] = True
        candidates = [target]
    found = (
        env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], c, node, content)
        for c in candidates
    )
    return next((reference for reference in found if reference is not None), None)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", found_elsewhere, priority=400)  # before intersphinx looks
