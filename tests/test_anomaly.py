"""Anomaly scores: each is the sum of log densities that it says it is."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import ShortRunGuide, anomaly_score, energy_prior
from pyro_shortrun.anomaly import Above, Bound, Joint, Reconstruction

pytestmark = pytest.mark.filterwarnings("error")


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
    torch.testing.assert_close(anomaly_score(guide, model, x), -joint, **close)
    torch.testing.assert_close(anomaly_score(guide, model, x, score=Joint(), num_draws=3), -joint, **close)
    torch.testing.assert_close(anomaly_score(guide, model, x, score=Reconstruction()), -parts["x"], **close)
    entropy = -2 * dist.Normal(0.0, 1e-4).entropy() * 2
    found = anomaly_score(guide, model, x, score=Bound(), num_draws=2000)
    torch.testing.assert_close(found, entropy - joint, rtol=1e-2, atol=0.2)


def test_layers_above_from_the_guide():
    """z1 is a draw from the prior given z2; the energy of z1 alone is left out. Within 5 standard errors."""
    x = data()
    parts = terms(0.8 * x)
    log_q = -2 * dist.Normal(0.0, 1e-4).entropy()
    exact = parts["x"] + parts["z2"] + parts["top"] - log_q
    above = Above("z2", num_steps=20, step_size=5e-5)
    found = anomaly_score(guide, model, x, score=above, num_draws=100)
    torch.testing.assert_close(found, -exact, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("make", [AutoNormal, lambda m: ShortRunGuide(m, num_steps=3)], ids=["AutoNormal", "run"])
def test_any_guide(make):
    x = data()
    other = make(model)
    other(x)
    for score in (Joint(), Reconstruction(), Bound()):
        found = anomaly_score(other, model, x, score=score)
        assert found.shape == (3,) and found.isfinite().all()
    with pytest.raises(NotImplementedError, match="auxiliary sites"):
        anomaly_score(other, model, x, score=Above("z2"))


def test_refusals():
    x = data()
    with pytest.raises(ValueError, match="score must be a Score object"):
        anomaly_score(guide, model, x, score=Joint)
    with pytest.raises(ValueError, match="needs the names"):
        Above()
    with pytest.raises(ValueError, match="does not sample 'z9'"):
        anomaly_score(guide, model, x, score=Above("z9"))
