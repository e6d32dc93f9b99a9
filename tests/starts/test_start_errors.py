"""Bad starts: an error that names the site and the remedy, before the first step."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import latent_regression, local, refuses, regression
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import Persistent, Prior, ShortRunGuide


def test_start_guide_that_misses_a_site():
    def start(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = ShortRunGuide(latent_regression, start=start)
    refuses(guide, (torch.ones(3), torch.ones(3)), ValueError, r"start guide does not sample \['z'\]", "every latent")


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_start_guide_of_another_model(kind):
    def renamed(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    args = torch.ones(3), torch.ones(3)
    guide = ShortRunGuide(regression, step_size=0.01, start=kind(renamed))
    refuses(guide, args, ValueError, r"start guide does not sample \['w'\]", "for the same model")


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_start_guide_of_another_shape(kind):
    def model(x: Tensor, size: int = 3) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    guide = ShortRunGuide(model, step_size=0.01, start=kind(lambda x: model(x, 2)))
    refuses(guide, (torch.tensor(1.0),), ValueError, r"samples 'w' in shape \(2,\), the model in shape \(3,\)")


def test_start_guide_whose_training_diverged():
    args = torch.ones(3), torch.ones(3)
    start = AutoNormal(regression)
    guide = ShortRunGuide(regression, step_size=0.01, start=start).setup(*args)
    with torch.no_grad():
        start.locs.w_unconstrained.fill_(math.nan)
    with pytest.raises(ValueError, match=r"training has diverged: .*locs\.w.* not finite.*smaller step_size"):
        guide(*args)


def test_start_guide_that_flattens_a_subsampled_plate():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def start(x: Tensor) -> None:
        flat = pyro.sample("flat", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Delta(flat))

    guide = ShortRunGuide(model, start=start)
    refuses(guide, (torch.ones(6),), NotImplementedError, "start guide samples 'flat' outside", "create_plates")


def test_persistent_with_a_changed_number_of_data():
    guide = ShortRunGuide(local, num_steps=2, step_size=0.01, start=Persistent())
    guide(torch.ones(4))
    with pytest.raises(ValueError, match=r"keeps 4 states.*now has 3 elements.*subsample_size.*Prior\(\)"):
        guide(torch.ones(3))


def test_persistent_with_vectorised_particles():
    guide = ShortRunGuide(local, num_steps=2, step_size=0.01, start=Persistent())
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    with pytest.raises(NotImplementedError, match="one state per datum.*num_particles=1"):
        elbo.loss_and_grads(local, guide, torch.ones(4))


def test_persistent_with_shared_latents_beside_a_subsampled_plate():
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = ShortRunGuide(model, start=Persistent())
    refuses(guide, (torch.ones(6),), NotImplementedError, "subsampled", r"full batch or Prior\(\)")


def test_subsampled_plates_that_do_not_nest():
    """Local latents in two different subsampled plates: log q of neither can be scaled."""

    def model(x: Tensor) -> None:
        with pyro.plate("a", 6, subsample_size=3):
            pyro.sample("z_a", dist.Normal(0.0, 1.0))
        with pyro.plate("b", 4, subsample_size=2):
            pyro.sample("z_b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refuses(ShortRunGuide(model, start=Prior()), (torch.tensor(0.0),), NotImplementedError, "'z_(a|b)'", "full batch")
