"""The house: packages import one way, modules in no circle, and every name comes from the module that defines it."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pyro_shortrun

ROOT = Path(pyro_shortrun.__file__).parent
FLOORS = [
    {"checks", "tensors"},
    {"density"},
    {"dynamics", "starts", "compile"},
    {"objectives"},
    {"runs"},
    {"guides", "mcmc", "energy"},
    {"amortized", "semi_implicit", "teaching", "evaluation"},
    {"diagnostics", "io"},
]
FLOOR = {package: i for i, packages in enumerate(FLOORS) for package in packages}
PROGRAM = ROOT / "__main__.py"  # uses the package as any other program does
FILES = [f for f in sorted(ROOT.rglob("*.py")) if f != PROGRAM]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}
CODE = {name: f for name, f in MODULES.items() if f.name != "__init__.py"}
PACKAGES = {name.removesuffix(".__init__"): f for name, f in MODULES.items() if name.endswith(".__init__")}


def package(name: str) -> str:
    return name.split(".")[0]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@cache
def imports(name: str) -> list[tuple[str, str]]:
    """``(module, name)`` of what a module imports from this package, anywhere in it."""
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("pyro_shortrun")):
            above = name.split(".")[: -node.level] if node.level else []
            target = ".".join([*above, *((node.module or "").removeprefix("pyro_shortrun").strip(".").split("."))])
            found += [(target.strip("."), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if package(a.name) == "pyro_shortrun"]
    return found


def defined(name: str) -> set[str]:
    """Names that a module gives a value itself."""
    names: set[str] = set()
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return names


def test_packages_import_one_way():
    """Floor by floor, and no package one of its own floor."""
    assert {package(name) for name in CODE} == set(FLOOR)
    arrows = {(name, target) for name in CODE for target, _ in imports(name) if package(name) != package(target)}
    assert not sorted(f"{a} -> {b}" for a, b in arrows if FLOOR[package(b)] >= FLOOR[package(a)])


def test_modules_are_in_no_circle():
    order = TopologicalSorter({name: {target for target, _ in imports(name)} for name in CODE})
    order.prepare()  # a CycleError shows the circle


def test_every_package_has_several_users():
    """Modules of other packages; or those who use what is at the top of pyro_shortrun."""
    users: dict[str, set[str]] = {name: set() for name in PACKAGES}
    for name in CODE:
        for target, _ in imports(name):
            if package(target) != package(name) and package(target) in users:
                users[package(target)].add(name)
    at_the_top = {package(target) for target, _ in imports("__init__")}
    assert not {
        name: found for name, found in users.items() if len(found) < 2 and name not in at_the_top | {"__init__"}
    }


def test_every_name_comes_from_the_module_that_defines_it():
    assert not sorted(
        f"{name}: {target}.{what}"
        for name in MODULES
        for target, what in imports(name)
        if target not in CODE or what not in defined(target)
    )


def test_packages_say_what_they_are_for_and_what_is_public():
    for name, file in PACKAGES.items():
        init = tree(".".join(file.relative_to(ROOT).with_suffix("").parts))
        doc = ast.get_docstring(init)
        assert doc and (name == "__init__" or doc.count("\n") == 0), name
        public = next(n.value for n in init.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        imported = [a.asname or a.name for n in init.body if isinstance(n, ast.ImportFrom) for a in n.names]
        assert sorted(ast.literal_eval(public)) == sorted(imported), name


def test_modules_have_one_subject_and_are_short():
    assert all(ast.get_docstring(tree(name)) for name in MODULES)
    lines = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > 350}
