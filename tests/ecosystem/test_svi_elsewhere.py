"""Training loops that people have: modules of others around a model and a guide of ours."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from pyro_shortrun import Init, Prior, ShortRunELBO, ShortRunGuide

ROWS, GENES = 24, 6


def counts() -> Tensor:
    rate = torch.stack([torch.arange(GENES) + 1.0, 2.0 * torch.ones(GENES)])
    return torch.poisson(rate[torch.arange(ROWS) % 2], generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- a module as scvi-tools has them


class Module(PyroModule):
    """Counts of cells: a latent for each, mini-batches by index, and the rates as return value."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, GENES)

    def create_plates(self, x: Tensor, index: Tensor) -> Any:
        return pyro.plate("cells", ROWS, dim=-1, subsample=index)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with self.create_plates(x, index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = self.decoder(z).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)
        return rate


def test_mini_batches_by_index_and_predictions_of_what_the_model_returns():
    """The trained rates predict the counts better than one rate for all cells."""
    x, model = counts(), Module()
    guide = ShortRunGuide(model, num_steps=5, start=Prior(), create_plates=model.create_plates)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    loader = DataLoader(TensorDataset(x, torch.arange(ROWS)), batch_size=8, shuffle=True)
    for _ in range(20):
        for batch, index in loader:
            svi.step(batch, index)
    everything = torch.arange(ROWS)
    predictive = Predictive(model, guide=guide, num_samples=30, return_sites=("z", "_RETURN"))
    found = predictive(x, everything)
    assert found["z"].shape == (30, ROWS, 2)
    rate = found["_RETURN"].reshape(30, ROWS, GENES).mean(0)
    score = dist.Poisson(rate).log_prob(x).sum(-1).mean()
    assert score > dist.Poisson(x.mean(0)).log_prob(x).sum(-1).mean()


# ---------------------------------------------------------------- torch's own loops


def shared(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 3)  # type: ignore[misc]

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


@pytest.fixture
def local_params():
    with pyro.settings.context(module_local_params=True):
        yield


def made(x: Tensor) -> tuple[Decoder, ShortRunGuide]:
    model = Decoder()
    return model, ShortRunGuide(model, num_steps=3, start=Prior()).setup(x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, ShortRunELBO])
def test_an_elbo_as_a_module_and_an_optimiser_of_torch(local_params, elbo):
    """All parameters of model and guide are the module's, and the loss falls."""
    x = 2.0 + torch.randn(20, 3)
    model, guide = made(x)
    loss: ELBOModule = elbo()(model, guide)
    names = dict(loss.named_parameters())
    assert {id(p) for p in names.values()} == {id(p) for p in (*model.parameters(), *guide.parameters())}
    optimiser, losses = torch.optim.Adam(loss.parameters(), lr=0.05), []
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_an_averaged_guide(local_params):
    """The mean of a guide's parameters over steps is a guide."""
    x = torch.randn(20, 3)
    model, guide = made(x)
    averaged = AveragedModel(guide, use_buffers=False)
    optimiser, seen = torch.optim.SGD(guide.parameters(), lr=0.1), []
    for _ in range(3):
        optimiser.zero_grad()
        Trace_ELBO().differentiable_loss(model, guide, x).backward()
        optimiser.step()
        averaged.update_parameters(guide)
        seen.append([p.detach().clone() for p in guide.parameters()])
    for mean, *each in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(each).mean(0))
    assert averaged.module.sample_posterior(x, num_samples=2)["z"].shape == (1, 2, 20, 2)


def test_fabric(local_params):
    fabric = pytest.importorskip("lightning_fabric")
    x = 2.0 + torch.randn(20, 3)
    model, guide = made(x)
    loss = Trace_ELBO()(model, guide)
    run = fabric.Fabric(accelerator="cpu", devices=1)
    module, optimiser = run.setup(loss, torch.optim.Adam(loss.parameters(), lr=0.05))
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        value = module(x)
        run.backward(value)
        optimiser.step()
        losses.append(value.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_lightning(local_params):
    lightning = pytest.importorskip("lightning.pytorch")
    x = 2.0 + torch.randn(20, 3)
    model, guide = made(x)

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.loss = Trace_ELBO()(model, guide)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.loss(*batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.loss.parameters(), lr=0.05)

    before = [p.detach().clone() for p in guide.parameters()]
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Training(), DataLoader(TensorDataset(x), batch_size=20))
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


# ---------------------------------------------------------------- other losses


def test_reweighted_wake_sleep():
    """Weights of runs are those of a guide: the posterior mean of a Gaussian is found."""
    x = torch.full((4,), 3.0)
    guide = ShortRunGuide(shared, num_steps=5, step_size=0.05, start=Init(lambda s: torch.zeros(()), scale=1.0))
    elbo = ReweightedWakeSleep(num_particles=4, vectorize_particles=False, model_has_params=False, insomnia=1.0)
    svi = SVI(shared, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(5):
        assert torch.isfinite(torch.as_tensor(svi.step(x))).all()
    found = guide.sample_posterior(x, num_samples=500, adjust=20)["loc"]
    assert found.mean().item() == pytest.approx(12 / 4.01, abs=0.15)  # five standard errors
