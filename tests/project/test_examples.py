"""Every example runs, README's code runs, importing changes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


def python(*args: str, cwd: Path | None = None) -> str:
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# What each example prints and writes to its output folder, at the least.
EXPECTED = {
    "quickstart": ("test MSE", {"reconstructions.png", "samples.png", "training.png", "trajectories.png"}),
    "first_posterior": ("AutoNormal", {"posterior.png"}),
    "energy_prior": ("MMD^2 before", {"mmd.txt", "prior.png"}),
    "distributed": ("gradient of 2 ranks", {"ranks-2.txt"}),
    "fabric": ("gradient of 2 ranks", {"fabric.txt"}),
    "energy_images": ("with energy", {"images.txt", "samples.png", "layers.png"}),
    "langevin_autoencoder": ("std of codes", {"reconstructions.png", "samples.png", "posterior.png", "training.png"}),
    "first_calls": ("compiler s", {"table.txt", "results.json"}),
    "many_guides": ("alive", {"table.txt", "results.json"}),
    "lae": ("-log p(x)", {"lae.txt", "lae.json", "results.json"}),
    "coopnets": ("taught by regression", {"coopnets.txt", "samples.png", "chains.png"}),
    "variational_teaching": ("dual", {"teaching.txt", "samples.png", "chains.png"}),
    "sis_rnn": ("log p(x) / step", {"table.txt", "sequences.png"}),
    "vgrnn": ("AUC", {"vgrnn.png"}),
    "link_prediction": ("no claim", {"links.txt", "results.json"}),
    "anomaly": ("base rate", {"anomaly.txt", "results.json"}),
    "chains": ("ESS/CPU s", {"table.txt", "results.json"}),
    "posteriordb": ("R-hat", {"table.txt", "results.json"}),
    "gradients": ("posteriors where", {"table.txt", "results.json", "distance.png"}),
    "posteriors": ("Right in all three", {"table.txt", "results.json", "errors.png"}),
    "scaling": ("SIMULATED", {"scaling.txt", "results.json"}),
    "generators": ("CPU seconds each", {"generators.txt", "results.json"}),
    "soak": ("drift of frozen", {"soak.txt", "results.json", "soak.png"}),
    "speed": ("Peak memory", {"speed.txt", "results.json"}),
    "walk": ("changes of module", {"walk.txt", "results.json"}),
    "tuning": ("s/best", {"tuning.txt", "results.json"}),
}
# Imported by an example.
MODULES = {"gradients_dais", "gradients_rivals", "posteriordb_models", "record", "speed_models", "speed_jax"}
MODULES |= {"posteriors_language", "posteriors_methods", "posteriors_models", "posteriors_numpyro", "teaching_images"}
MODULES |= {"generators_data", "generators_methods", "image_files"}


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in MODULES], ids=lambda p: p.stem)
def test_example_runs(path, tmp_path):
    out = python(str(path), "--smoke", "--output", str(tmp_path))
    text, files = EXPECTED[path.stem]
    assert text in out
    assert files <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "options", [["coopnets", "--toy"]] + [["variational_teaching", "--condition", c] for c in ("label", "half")]
)
def test_teaching_example_runs_otherwise(options, tmp_path):
    out = python(str(ROOT / "examples" / f"{options[0]}.py"), *options[1:], "--smoke", "--output", str(tmp_path))
    assert "refined" in out and (tmp_path / "chains.png").exists()


def test_posterior_file_of_the_quickstart_opens_in_arviz(tmp_path):
    import arviz as az
    import numpy as np

    images = np.random.default_rng(0).integers(0, 255, (140, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images[:120], x_test=images[120:])
    python(str(ROOT / "examples" / "quickstart.py"), "--smoke", "--data", "data.npz", "--output", "out", cwd=tmp_path)
    posterior = az.from_netcdf(str(tmp_path / "out" / "posterior.nc"))["posterior"]
    assert dict(posterior.sizes)["chain"] == 4
    assert {"z2", "z1_decentered"} <= set(posterior.data_vars)


# No warning passes, but for the one that ArviZ 0.23 gives at its first import of the day.
PRELUDE = r"""
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing")
"""


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_snippets_run_in_order(name):
    code = "\n".join(snippets(name))
    assert code or name != "README.md"
    if code:
        python("-c", PRELUDE + code)


def test_readme_names_two_commands():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\bmake (\w+)", text)) == {"demo", "test"}


def test_importing_changes_nothing_global():
    code = """
import warnings, logging, torch, pyro, pyro.distributions as dist
before = (torch.get_default_dtype(), torch.is_grad_enabled(), list(warnings.filters), logging.root.level,
          torch.distributions.Distribution._Distribution__validate_args if hasattr(torch.distributions.Distribution,
          '_Distribution__validate_args') else torch.distributions.Distribution._validate_args,
          len(pyro.get_param_store()), torch.random.get_rng_state().sum().item())
import pyro_shortrun
after = (torch.get_default_dtype(), torch.is_grad_enabled(), list(warnings.filters), logging.root.level,
         torch.distributions.Distribution._Distribution__validate_args if hasattr(torch.distributions.Distribution,
          '_Distribution__validate_args') else torch.distributions.Distribution._validate_args,
         len(pyro.get_param_store()), torch.random.get_rng_state().sum().item())
assert before == after, (before, after)
assert set(pyro_shortrun.__all__) <= set(dir(pyro_shortrun))
"""
    python("-c", code)


def test_importing_leaves_plots_and_compilers_to_their_first_use():
    code = """
import sys, torch, pyro
before = set(sys.modules)
import pyro_shortrun
early = {"arviz", "matplotlib", "pandas", "xarray", "torch._dynamo", "torch._inductor"} & (set(sys.modules) - before)
assert not early, early
"""
    python("-c", code)
