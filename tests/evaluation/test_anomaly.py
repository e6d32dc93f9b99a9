"""Anomaly scores: each is the sum of log densities that it says it is."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide, energy_prior
from pyro_shortrun.energy import PriorRuns
from pyro_shortrun.evaluation import (
    Above,
    Bound,
    Energies,
    Joint,
    Latents,
    Reconstruction,
    Score,
    anomaly_score,
    anomaly_scores,
)


def data() -> Tensor:
    return torch.tensor([[0.0, 0.5], [1.0, -2.0], [4.0, 4.0]])


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        energy_prior("top", lambda z: z.square().sum(-1), z2)
        z1 = pyro.sample("z1", dist.Normal(z2, 0.01).to_event(1))
        energy_prior("low", lambda z: 0.3 * z.sum(-1), z1)
        pyro.sample("x", dist.Normal(z1, 0.5).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    """All but certain, so that scores hardly vary."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.8 * x, 1e-4).to_event(1))
        pyro.sample("z1", dist.Normal(z2, 1e-4).to_event(1))


def terms(z: Tensor) -> dict[str, Tensor]:
    return {
        "x": dist.Normal(z, 0.5).log_prob(data()).sum(-1),
        "z2": dist.Normal(0.0, 1.0).log_prob(z).sum(-1),
        "top": -z.square().sum(-1),
        "z1": dist.Normal(0.0, 0.01).log_prob(torch.zeros(3, 2)).sum(-1),
        "low": -0.3 * z.sum(-1),
    }


def test_terms_of_scores():
    x = data()
    parts = terms(0.8 * x)
    joint = sum(parts.values())
    close = dict(rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(anomaly_score(model, guide, x), -joint, **close)
    torch.testing.assert_close(anomaly_score(model, guide, x, score=Joint(), num_draws=3), -joint, **close)
    torch.testing.assert_close(anomaly_score(model, guide, x, score=Reconstruction()), -parts["x"], **close)
    entropy = -2 * dist.Normal(0.0, 1e-4).entropy() * 2
    found = anomaly_score(model, guide, x, score=Bound(), num_draws=2000)
    torch.testing.assert_close(found, entropy - joint, rtol=1e-2, atol=0.2)


def test_terms_add_up():
    """The joint is the data's term and the latents', of the same draw; the energies' are a part of the latents'."""
    scores: dict[str, Score] = {
        "joint": Joint(),
        "data": Reconstruction(),
        "latents": Latents(),
        "energies": Energies(),
    }
    found = anomaly_scores(model, guide, data(), scores=scores, num_draws=3)
    torch.testing.assert_close(found["joint"], found["data"] + found["latents"])
    parts = terms(0.8 * data())
    torch.testing.assert_close(found["energies"], -parts["top"] - parts["low"], rtol=1e-2, atol=2e-2)


def with_global(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        energy_prior("ebm", lambda z: 0.1 * z.square(), z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_global_latents_add_a_constant():
    """One score per datum all the same."""
    x = torch.tensor([0.0, 1.0, 6.0])
    other = AutoNormal(with_global)
    other(x)
    draw: dict[str, Tensor] = {}

    def watched(x: Tensor) -> None:
        draw.update(other(x))

    watched_guide = poutine.trace(watched)
    found = anomaly_score(with_global, watched_guide, x)
    z, mu = draw["z"], draw["mu"]
    exact = dist.Normal(z, 0.5).log_prob(x) + dist.Normal(mu, 1.0).log_prob(z) - 0.1 * z.square()
    torch.testing.assert_close(found - found[0], exact[0] - exact)
    assert anomaly_score(with_global, other, x, score=Bound()).shape == (3,)


def test_layers_above_from_the_guide():
    """z1 is a draw from the prior given z2; the energy of z1 alone is left out. Within 5 standard errors."""
    x = data()
    parts = terms(0.8 * x)
    log_q = -2 * dist.Normal(0.0, 1e-4).entropy()
    exact = parts["x"] + parts["z2"] + parts["top"] - log_q
    above = Above("z2", runs=PriorRuns(20, 5e-5))
    found = anomaly_score(model, guide, x, score=above, num_draws=100)
    torch.testing.assert_close(found, -exact, rtol=1e-2, atol=0.5)
    prior = above._prior
    anomaly_score(model, guide, x, score=above)
    assert above._prior is prior  # and with it what was compiled


@pytest.mark.parametrize(
    "make", [AutoNormal, lambda m: ShortRunGuide(m, num_steps=3, start=Prior())], ids=["AutoNormal", "run"]
)
def test_any_guide(make):
    x = data()
    other = make(model)
    other(x)
    for score in (Joint(), Reconstruction(), Bound()):
        found = anomaly_score(model, other, x, score=score)
        assert found.shape == (3,) and found.isfinite().all()
    with pytest.raises(NotImplementedError, match="auxiliary sites"):
        anomaly_score(model, other, x, score=Above("z2"))


def test_refusals():
    x = data()
    with pytest.raises(ValueError, match="score must be a Score object"):
        anomaly_score(model, guide, x, score=Joint)
    with pytest.raises(ValueError, match="sites must be names"):
        Above()
    with pytest.raises(ValueError, match="does not sample 'z9'"):
        anomaly_score(model, guide, x, score=Above("z9"))


def test_guides_without_a_latent_are_refused():
    """Its prior draw would be scored as if the guide had inferred it."""

    def half(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x, 0.1).to_event(1))

    with pytest.raises(ValueError, match="does not sample the model's latent 'z2'"):
        anomaly_score(model, half, data())


def test_what_has_no_score_per_datum_is_refused():
    x = data()
    joint = AutoDiagonalNormal(model)
    joint(x)
    assert anomaly_score(model, joint, x).shape == (3,)
    with pytest.raises(NotImplementedError, match="'_AutoDiagonalNormal_latent' lies outside plate"):
        anomaly_score(model, joint, x, score=Bound())

    def thinned() -> None:
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"\['z'\] lie in a subsampled plate"):
        anomaly_score(thinned, thinned)

    def unseen() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        anomaly_score(unseen, unseen, score=Reconstruction())
    with pytest.raises(ValueError, match="no energy_prior"):
        anomaly_score(unseen, unseen, score=Energies())


def test_discrete_latents_are_refused():
    """They would be drawn from their prior, whatever the data say."""

    @config_enumerate
    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(torch.tensor([-3.0, 3.0])[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def encoder(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    with pytest.raises(NotImplementedError, match="discrete latents"):
        anomaly_score(mixture, encoder, torch.zeros(3))
