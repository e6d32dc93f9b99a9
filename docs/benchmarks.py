"""Writes ``docs/benchmarks.md`` from ``docs/benchmarks/*.json``, the ``results.json`` files of benchmark scripts.

python docs/benchmarks.py            # writes the page
python docs/benchmarks.py --print    # prints it
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

DOCS = Path(__file__).parent
SCRIPTS = DOCS.parent / "examples" / "benchmarks"

# Each script's full run, and the page that has its table and says what it means.
FULL = {
    "anomaly": ("--data mnist.npz --quick", "energy.md#measured"),
    "chains": ("", "chains.md#how-it-compares-with-nuts"),
    "first_calls": ("", "speed.md#training-steps-as-one-graph"),
    "generators": ("--data FOLDER", "objectives.md#generators"),
    "gradients": ("--data FOLDER --quick --jax-python PYTHON", "objectives.md#sixteen-posteriors"),
    "lae": ("--data mnist.npz --quick", "autoencoder.md#measured"),
    "link_prediction": ("--data FOLDER", "semi_implicit.md#dynamic-graphs"),
    "many_guides": ("", "reliability.md#many-guides"),
    "posteriordb": ("--data FOLDER --dense --uniform", "chains.md#how-it-compares-with-nuts"),
    "posteriors": ("--data FOLDER --jax-python PYTHON", "comparison.md#the-plain-swap"),
    "scaling": ("--quick", "scaling.md"),
    "soak": ("", "reliability.md#a-long-run"),
    "speed": ("--quick", "speed.md"),
    "walk": ("--compiled --against CHECKOUT", "architecture.md"),
    "tuning": ("", "objectives.md#where-the-truth-is-known"),
}

HEAD = """# Benchmarks

<!-- Made by docs/benchmarks.py from docs/benchmarks/*.json. -->

Figures of recent runs of the scripts in `examples/benchmarks/`, with the command, the date, the machine's kind and the
versions that they come from. Most are parts of longer runs, whose older tables are on other pages, with what they
mean:

| script | the longer run | its table |
|---|---|---|
"""

NOTE = """
Every script takes `--output FOLDER` and writes `results.json` there; `--smoke` shows in seconds that it runs. To renew
a section, copy that file to `docs/benchmarks/SCRIPT.json` and run `python docs/benchmarks.py`. *Load* is the mean
number of busy processes in the last minute: where it exceeds the number of CPUs, other programs ran as well, and all
that is measured in seconds is worse than it need be.
"""


def purpose(name: str) -> str:
    """The first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text()))
    return " ".join(text.split("\n\n")[0].split())


def title_of(page: str) -> str:
    return (DOCS / page.partition("#")[0]).read_text().partition("\n")[0].lstrip("# ")


def overview(name: str) -> str:
    options, page = FULL[name]
    here = f"[`{name}`](#{name.replace('_', '-')})" if (DOCS / "benchmarks" / f"{name}.json").exists() else f"`{name}`"
    return f"| {here} | `{f'{name}.py {options}'.strip()}` | [{title_of(page)}]({page}) |"


def cell(value: float | int | str | None, form: str) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else format(value, form).strip()
    return text.replace("|", r"\|").replace("*", r"\*")


def table(found: dict) -> list[str]:
    forms = list(found["columns"].values())
    sides = [":--" if form.endswith("s") and not form.startswith(">") else "--:" for form in forms]
    lines = [list(found["columns"]), sides]
    lines += [[cell(value, form) for value, form in zip(row, forms, strict=True)] for row in found["rows"]]
    return [f"*{found['title']}*", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def provenance(found: dict) -> str:
    machine = found["machine"]
    gpu = machine["gpu"] or "no GPU"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    kind = f"{machine['cpus']} CPUs ({machine['processor']}, {machine['system']}), {gpu}, {threads}"
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date']}, {found['minutes']:g} minutes, load {machine['load']}; {kind}; {packages}."


def section(path: Path) -> list[str]:
    found = json.loads(path.read_text())
    lines = [f"## {path.stem}", "", purpose(path.stem), "", "```sh", found["command"], "```", "", provenance(found), ""]
    return lines + [line for each in found["tables"] for line in table(each)]


def page() -> str:
    head = HEAD + "\n".join(map(overview, FULL)) + "\n" + NOTE
    parts = [line for path in sorted((DOCS / "benchmarks").glob("*.json")) for line in section(path)]
    return "\n".join([head, *parts]).rstrip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        (DOCS / "benchmarks.md").write_text(page())
