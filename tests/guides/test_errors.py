"""Bad input: an error that names the site or argument and the remedy, before the first step of any run."""

from __future__ import annotations

import math
import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import latent_regression, local, refuses, regression
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, JitTraceEnum_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_median, init_to_value
from torch import Tensor, nn

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Init,
    Langevin,
    PathDensity,
    Persistent,
    Prior,
    SemiImplicitGuide,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    psis,
)
from pyro_shortrun.density import Call, Program
from pyro_shortrun.diagnostics import compare_with_nuts
from pyro_shortrun.evaluation import importance_log_likelihood
from pyro_shortrun.objectives import Lanczos

# ------------------------------------------------------------------------------------------------ constructor


@pytest.mark.parametrize("name", ["num_steps", "tune_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_counts_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= 1, got {value}"):
        ShortRunGuide(local, **{name: value}, start=Prior())


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, -math.inf, "large"])
@pytest.mark.parametrize(
    "make",
    [lambda eta: ShortRunGuide(local, step_size=eta, start=Prior()), Langevin, StepSize],
    ids=["ShortRunGuide", "Langevin", "StepSize"],
)
def test_step_size_must_be_positive_and_finite(make, value):
    with pytest.raises(ValueError, match=r"step_size must be a finite number > 0, got .*try"):
        make(value)


@pytest.mark.parametrize("bound", [0.05, 0.1, -1.0, math.nan, math.inf])
def test_step_size_must_be_below_a_finite_max(bound):
    with pytest.raises(ValueError, match="step_size 0.1 must be below max=.*larger finite max"):
        StepSize(0.1, max=bound)


def test_step_size_names_its_kinds():
    with pytest.raises(ValueError, match="'shared', 'step', 'site' or 'dim', got 'layer'"):
        StepSize(0.1, per="layer")  # type: ignore[arg-type]


def test_dynamics_has_its_own_step_size():
    with pytest.raises(ValueError, match=r"step_size or dynamics, not both.*Langevin\(step_size\)"):
        ShortRunGuide(local, step_size=0.1, dynamics=Langevin(0.1), start=Prior())


@pytest.mark.parametrize(
    "make,name",
    [
        (lambda: Langevin(0.1, max_drift=0.0), "max_drift"),
        (lambda: Langevin(0.1, max_drift=math.nan), "max_drift"),
        (lambda: Init(init_to_value, scale=0.0), "scale"),
        (lambda: Persistent(refresh=1.5), "refresh"),
        (lambda: Lanczos(num_probes=0), "num_probes"),
    ],
)
def test_other_arguments_out_of_range(make, name):
    with pytest.raises(ValueError, match=name):
        make()


# ------------------------------------------------------------------------------------------------ models


def test_discrete_latent_that_is_not_enumerated():
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    refuses(
        ShortRunGuide(model, start=Prior()),
        (torch.ones(3),),
        ValueError,
        "'k' is discrete",
        "config_enumerate",
        "poutine.block",
    )


def test_discrete_latent_with_infinite_support():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Poisson(2.0), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    refuses(ShortRunGuide(model, start=Prior()), (torch.ones(3),), ValueError, "'k'", "infinite support", "marginalise")


def test_hidden_discrete_latent_with_infinite_support():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    guide = ShortRunGuide(poutine.block(model, hide=["k"]), start=Prior())
    refuses(guide, (torch.tensor(1.0),), ValueError, "'k'", "infinite support")


@pytest.mark.parametrize("make", [ShortRunGuide, lambda m: ShortRunGuide(m, start=Prior()), SemiImplicitGuide])
@pytest.mark.parametrize("plates", [True, False])
def test_latents_without_values(make, plates):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)) if plates else nullcontext():
            z = pyro.sample("z", dist.Normal(torch.zeros(0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x if plates else x[0])

    refuses(make(model), (torch.ones(3),), ValueError, "'z' has no values", "size 0", "Leave it out")


@pytest.mark.parametrize("observed", [True, False])
def test_model_without_latents(observed):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if observed:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refuses(
        ShortRunGuide(model, start=Prior()), (torch.ones(3),), ValueError, "no continuous latent sites", "empty guide"
    )


def test_model_whose_only_latents_are_enumerated():
    @pyro.infer.config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    refuses(ShortRunGuide(model, start=Prior()), (torch.ones(3),), ValueError, "no continuous latent sites")


def test_sequential_plate_with_latents():
    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    refuses(
        ShortRunGuide(model, start=Prior()),
        (torch.ones(3),),
        NotImplementedError,
        "'z_0'",
        "sequential",
        "with pyro.plate",
    )


def test_sequential_plate_without_latents_is_fine():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    guide = ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())
    assert math.isfinite(SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(torch.ones(3)))


def test_latents_of_mixed_dtypes():
    def model(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = torch.ones((), dtype=torch.float64)
    refuses(
        ShortRunGuide(model, start=Prior()), (x,), ValueError, "'a' is torch.float32", "'b' is torch.float64", "cast"
    )


def test_hidden_continuous_latent_without_a_value():
    model = poutine.block(latent_regression, hide=["w"])
    refuses(
        ShortRunGuide(model, start=Prior()),
        (torch.ones(3), torch.ones(3)),
        ValueError,
        "'w' is hidden",
        "append the part",
    )


def test_parts_of_a_list_in_the_wrong_order():
    guide = AutoGuideList(latent_regression)
    guide.append(ShortRunGuide(poutine.block(latent_regression, expose=["z"]), start=Prior()))
    guide.append(AutoNormal(poutine.block(latent_regression, expose=["w"])))
    with pytest.raises(ValueError, match="'w' is hidden.*append the part that samples it first"):
        poutine.trace(guide).get_trace(torch.ones(3), torch.ones(3))


def test_part_of_a_list_called_by_itself():
    """The short run finds the other parts' draws in a call of the list: the error says so also after training."""
    x, y = torch.ones(3), torch.ones(3)
    guide = AutoGuideList(latent_regression)
    guide.append(AutoNormal(poutine.block(latent_regression, expose=["w"])))
    guide.append(
        ShortRunGuide(poutine.block(latent_regression, expose=["z"]), num_steps=2, step_size=0.01, start=Prior())
    )
    for trained in (False, True):
        if trained:
            SVI(latent_regression, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(x, y)
        with pytest.raises(ValueError, match="'w' is hidden.*call the list, not the part"):
            guide[1](x, y)


def test_create_plates_must_return_plates():
    guide = ShortRunGuide(local, create_plates=lambda x: ["data"], start=Prior())
    refuses(guide, (torch.ones(3),), ValueError, "create_plates.*pyro.plate")


def test_plate_around_the_guide_that_collides_with_the_models():
    guide = ShortRunGuide(local, num_steps=1, step_size=0.01, start=Prior())
    with pytest.raises(ValueError, match=r"dim to the left of -\d"):
        with pyro.plate("around", 2, dim=-1):
            guide(torch.ones(3))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite(bad):
    x = torch.tensor([0.5, bad, 1.0])
    refuses(
        ShortRunGuide(local, start=Prior()), (x,), ValueError, "not finite at the start", "site 'x'", "check the data"
    )


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda z: dist.LogNormal(z, 1.0),
        lambda z: dist.Gamma(z.exp(), 1.0),
        lambda z: dist.Beta(z.exp(), 2.0),
        lambda z: dist.HalfNormal(z.exp()),
        lambda z: dist.Uniform(0.0, 1.0 + z.exp()),
        lambda z: dist.Pareto(1.0, z.exp()),
    ],
    ids=["LogNormal", "Gamma", "Beta", "HalfNormal", "Uniform", "Pareto"],
)
def test_observation_outside_the_support(likelihood):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z), obs=x)

    refuses(ShortRunGuide(model, start=Prior()), (torch.tensor([0.5, -1.0]),), ValueError, "'x'", "support")


def test_density_that_is_not_finite_for_one_chain_of_many():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z < 1e3, 0.0, -math.inf) + 0 * x.sum())

    start = Init(init_to_value(values={"z": torch.tensor(2e3)}))
    refuses(ShortRunGuide(model, start=start), (torch.ones(2),), ValueError, "site 'wall'", "start=Init")


def test_error_does_not_spoil_the_guide():
    """The same guide then infers good data as a new one does."""
    x = torch.tensor([0.5, -1.0])
    fresh, spoilt = (ShortRunGuide(local, num_steps=3, dynamics=Langevin(0.1), start=Prior()) for _ in range(2))
    with pytest.raises(ValueError, match="site 'x'"):
        spoilt(torch.full((2,), math.nan))
    draws = []
    for guide in (fresh, spoilt):
        guide.setup(x)
        pyro.set_rng_seed(1)
        draws.append(guide(x)["z"])
    torch.testing.assert_close(draws[0], draws[1])


# ------------------------------------------------------------------------------------------------ between calls


def test_latent_whose_shape_changes():
    def model(n: int) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    guide = ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())
    guide(3)
    with pytest.raises(ValueError, match="site 'z' has 4 values in a row, 3 when the guide was set up"):
        guide(4)
    guide(3)


def test_latents_that_change():
    def model(wide: bool) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if wide:
            z = z + pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide = ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())
    guide(False)
    with pytest.raises(ValueError, match=r"latent sites changed.*\['z'\].*\['extra', 'z'\].*one guide per model"):
        guide(True)


def test_observed_site_that_is_not_observed_at_prediction():
    x, y = torch.ones(4), torch.zeros(4)
    guide = ShortRunGuide(regression, num_steps=2, step_size=0.01, start=Prior())
    guide(x, y), guide(x, y + 1)
    for call in (guide, guide.sample_posterior, guide.median, Predictive(regression, guide=guide, num_samples=2)):
        with pytest.raises(ValueError, match=r"site 'y' was observed.*guide.condition_on\(\*training_args\)"):
            call(torch.ones(2))


@pytest.mark.parametrize("trained", [True, False])
def test_condition_on_with_local_latents_of_another_size(trained):
    guide = ShortRunGuide(latent_regression, num_steps=2, step_size=0.01, start=Prior())
    train = (torch.ones(4), torch.zeros(4))
    if trained:
        guide(*train)
    guide.condition_on(*train)
    with pytest.raises(ValueError, match=r"site 'z'.*\(4,\).*\(3,\).*guide.forget\(\)"):
        guide(torch.ones(3))


def test_condition_on_with_global_latents_takes_any_size():
    guide = ShortRunGuide(regression, num_steps=2, step_size=0.01, start=Prior()).condition_on(
        torch.ones(4), torch.zeros(4)
    )
    assert guide(torch.ones(3))["w"].shape == ()


# ------------------------------------------------------------------------------------------------ state


def test_step_sizes_before_setup():
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\)"):
        ShortRunGuide(local, start=Prior()).step_sizes()


def test_load_state_dict_before_setup():
    state = ShortRunGuide(local, step_size=0.01, start=Prior()).setup(torch.ones(3)).state_dict()
    assert state
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\).*before load_state_dict"):
        ShortRunGuide(local, step_size=0.01, start=Prior()).load_state_dict(state)


def test_unpickled_guide_needs_its_model():
    x = torch.ones(3)
    loaded = pickle.loads(pickle.dumps(ShortRunGuide(local, num_steps=2, step_size=0.01, start=Prior()).setup(x)))
    for call in (loaded, loaded.setup, loaded.sample_posterior, loaded.trajectory):
        with pytest.raises(RuntimeError, match=r"guide.attach\(model\)"):
            call(x)


@pytest.mark.parametrize("name", ["num_samples", "num_chains"])
def test_numbers_of_draws(name):
    guide = ShortRunGuide(local, num_steps=2, step_size=0.01, start=Prior())
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        guide.sample_posterior(torch.ones(3), **{name: 0})


# ------------------------------------------------------------------------------------------------ warnings


def test_random_model_warns_once():
    dropout = nn.Dropout(0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dropout(z), 1.0).to_event(1), obs=x)

    x = torch.ones(8, 3)
    guide = ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())
    with pytest.warns(UserWarning, match="log density is random.*dropout in eval mode"):
        guide(x)
    guide(x)
    dropout.eval()
    ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())(x)


def test_rows_coupled_by_batch_norm_warn_once():
    norm = nn.BatchNorm1d(3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(norm(z), 1.0).to_event(1), obs=x)

    x = torch.ones(8, 3)
    guide = ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())
    with pytest.warns(UserWarning, match="plate 'data' influence each other.*batch normalisation in eval mode"):
        guide(x)
    guide(x)
    norm.eval()
    ShortRunGuide(model, num_steps=2, step_size=0.01, start=Prior())(x)


# ------------------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize(
    "arguments,match",
    [
        ({"start": Prior}, r"start must be Prior\(\)"),
        ({"start": "prior"}, r"start must be Prior\(\)"),
        ({"start": init_to_median}, "start=Init"),
        ({"objective": PathDensity}, r"objective must be an Objective.*PathDensity\(\)"),
        ({"dynamics": 0.1}, r"dynamics must be a Dynamics.*Langevin\(0.1\)"),
    ],
)
def test_classes_and_strings_where_objects_belong(arguments, match):
    with pytest.raises(ValueError, match=match):
        ShortRunGuide(lambda: None, **{"start": Prior(), **arguments})


@pytest.mark.parametrize("make", [ShortRunGuide, ShortRunLangevin], ids=["guide", "kernel"])
def test_model_that_is_called_instead_of_passed(make):
    with pytest.raises(ValueError, match=r"model must be a function.*got a Tensor.*not model\(\.\.\.\)"):
        make(torch.ones(3))


@pytest.mark.parametrize("judge", [psis, compare_with_nuts])
def test_model_and_guide_swapped(judge):
    with pytest.raises(ValueError, match="model is a guide, ShortRunGuide: the model comes first"):
        judge(ShortRunGuide(regression, start=Prior()), regression, torch.ones(3), torch.ones(3))


def test_source_without_draws_is_refused_before_the_reference_runs():
    def untouched(x: Tensor) -> None:
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match="source must be a guide.*AutoNormal"):
        compare_with_nuts(untouched, AutoNormal, torch.ones(3))
    with pytest.raises(ValueError, match="call mcmc.run"):
        compare_with_nuts(untouched, VectorizedMCMC(ShortRunLangevin(untouched), num_samples=4), torch.ones(3))


@pytest.mark.parametrize("call", [ShortRunGuide.sample_posterior, ShortRunGuide.trajectory, ShortRunGuide.setup])
def test_calls_without_the_models_arguments(call):
    with pytest.raises(TypeError, match=r"missing 1 required .* 'x'.*guide\.sample_posterior\(\*args"):
        call(ShortRunGuide(regression, start=Prior()))


def test_type_errors_inside_the_model_stay_as_they_are():
    def model(x: Tensor) -> None:
        len(1)  # type: ignore[arg-type]

    with pytest.raises(TypeError) as caught:
        ShortRunGuide(model, start=Prior())(torch.ones(3))
    assert "has no len()" in str(caught.value) and "every call" not in str(caught.value)


def test_whole_numbers_as_data_of_a_density_of_reals():
    def model(y: Tensor) -> None:
        logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    guide = ShortRunGuide(model, step_size=0.01, start=Prior())
    refuses(guide, (torch.tensor([0, 1, 1]),), ValueError, "several dtypes", "argument 0 is torch.int64", r"x\.to")


def test_statistics_before_the_run():
    mcmc = VectorizedMCMC(ShortRunLangevin(local), num_samples=4)
    for ask in (mcmc.summary, mcmc.diagnostics, mcmc.get_samples):
        with pytest.raises(RuntimeError, match=r"call run\(\*args\) first"):
            ask()


def test_a_step_size_may_be_any_one_number():
    import numpy as np

    assert StepSize(torch.tensor(0.1)).init == pytest.approx(0.1)
    assert StepSize(np.float32(0.25)).init == 0.25


def test_blocks_of_an_arrowhead_that_mix_warn():
    mix = torch.randn(4, 4)

    def model() -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z @ mix, 1.0), obs=torch.zeros(4))

    with pytest.warns(UserWarning, match="'data' influence each other"):
        ShortRunGuide(model, num_steps=1, step_size=StepSize(0.01), start=Prior()).setup()


def test_evaluation_refuses_a_subsample():
    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ValueError, match="subsampled plate"):
        importance_log_likelihood(model, {"z": torch.zeros(9, 5)}, torch.ones(20))


def test_rows_drawn_again_are_told(caplog):
    def model() -> None:
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z > 0.0, torch.zeros(()), torch.tensor(-torch.inf)))

    ShortRunGuide(model, num_steps=1, step_size=StepSize(1e-6), start=Prior())()
    assert "drawn again" in caplog.text and "-log P(finite)" in caplog.text


def test_data_that_are_not_finite_are_no_start_to_draw_again(caplog):
    with pytest.raises(ValueError, match="nan"):
        ShortRunGuide(local, num_steps=1, start=Prior())(torch.tensor([1.0, math.nan]))
    assert "drawn again" not in caplog.text


def test_step_sizes_of_another_guide_are_named():
    x = torch.ones(3)
    older = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.1, per="step"), start=Prior()).setup(x)
    pyro.clear_param_store()
    ShortRunGuide(local, num_steps=3, step_size=StepSize(0.1, per="step"), start=Prior()).setup(x)
    with pytest.raises(ValueError, match=r"2 step sizes and Pyro's parameter store 3.*clear_param_store"):
        older(x)


@pytest.mark.parametrize("seed", range(6))
def test_latents_that_come_and_go_are_named(seed):
    """Whether the site was there when the call was read, or not."""

    def moody() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            pyro.sample("y", dist.Normal(x, 1.0))
        pyro.sample("o", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    pyro.set_rng_seed(seed)
    guide = ShortRunGuide(moody, num_steps=2, step_size=StepSize(0.5), start=Prior())
    with pytest.raises(ValueError, match="'y'"):
        for _ in range(20):
            guide()
    values = {"x": torch.tensor(-1.0), "y": torch.tensor(0.0)}
    bound = Call.of(lambda: poutine.condition(moody, {"x": torch.tensor(1.0)})(), (), {})
    with pytest.raises(ValueError, match="latent site 'y' disappeared in the middle of a run"):
        Program(moody).run(bound.bind, values)


# ------------------------------------------------------------------------------------------------ reasons


def unsized(x: Tensor) -> None:
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    "make",
    [
        ShortRunGuide,
        lambda m: ShortRunGuide(m, start=AutoNormal(m), objective=Annealed()),
        lambda m: SemiImplicitGuide(m, num_mixtures=2),
    ],
)
def test_a_plate_without_a_size_is_named(make):
    with pytest.raises(
        ValueError, match=r"plate 'data' around latent site 'z' has no size.*pyro.plate\('data', size\)"
    ):
        Trace_ELBO().loss(unsized, make(unsized), torch.zeros(4))


@pytest.mark.parametrize("objective", [Annealed(), GaussianReverse()])
def test_a_mask_is_given_as_the_reason(objective):
    def partly(y: Tensor, keep: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)

    args = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, False, True])
    guide = ShortRunGuide(partly, num_steps=2, objective=objective, start=AutoNormal(partly))
    with pytest.raises(NotImplementedError, match=r"poutine\.mask .*obs_mask"):
        Trace_ELBO().loss(partly, guide, *args)
    pyro.clear_param_store()
    right = ShortRunGuide(partly, num_steps=2, step_size=StepSize(0.01), objective=Annealed(), start=Prior())
    assert math.isfinite(Trace_ELBO().loss(partly, right, *args))  # the remedy


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceEnum_ELBO])
@pytest.mark.parametrize("make", [ShortRunGuide, lambda m: SemiImplicitGuide(m, num_mixtures=2)])
def test_jit_elbos_are_refused_in_a_sentence(elbo, make):
    with pytest.raises(NotImplementedError, match=r"torch\.jit .* use the ELBO without Jit.*compile=True"):
        elbo(ignore_jit_warnings=True).loss_and_grads(local, make(local), torch.zeros(3))
