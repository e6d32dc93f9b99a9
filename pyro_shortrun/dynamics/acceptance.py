"""Step by acceptance: step sizes of runs that have no bound to be tuned by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_between, check_count
from ..density.coordinates import site_index
from ..density.interface import Density
from .dynamics import Dynamics
from .langevin import Langevin
from .metropolis import Position, decide, hastings_log_ratio

_GAIN = 1.0
_AT_ONCE = 5
_EARLY, _MORE_OFTEN = 10, 5  # until 10 * every runs, 5 times as often
_TRIES = 30
_NEAR = 0.15  # how far below the target the first search may end
_LEAST = 1e-10  # step size, as a share of its upper bound
_MOST = 0.999


class Acceptance:
    r"""Lets step sizes follow the acceptance of one Langevin step from where runs end.

    From the end ``u`` of a run a Langevin step ``u'`` is proposed, and would be accepted with probability

    .. math:: \alpha = \min\Big(1, \frac{\pi(u')\, f(u \mid u')}{\pi(u)\, f(u' \mid u)}\Big) , \qquad
              \log \eta \leftarrow \log \eta + (\bar\alpha - \text{target}) ,

    the mean being over rows and chains; the proposal itself is not used. No log q is needed, and no determinant: two
    gradients at every ``every``-th run, five times as often in the first ``10 * every``, and after runs 1, 2, 4 and 8.
    Where the acceptance is far below the target the step is lowered again at once; before the first run until it comes
    near. Step sizes by site (``StepSize(per="site")``) each follow the acceptance of a step of that site's coordinates
    alone; per step or dimension they keep their ratios.

    A step size tuned by the mean log joint in place of this would collapse for runs with noise.

    :param target: wanted acceptance. The .75 is for latents of ten dimensions and more; in few dimensions steps are
        accepted that make the draws of an unadjusted run much too wide: ask for .95 there.
    :param every: runs from one adaptation to the next.
    :raises ValueError: for arguments out of range.

    >>> Acceptance(0.75).target
    0.75
    """

    def __init__(self, target: float = 0.75, every: int = 50) -> None:
        check_between("target", target, 0, 1, "0.75")
        check_count("every", every)
        self.target, self.every = target, every
        self.last: float | None = None

    def is_due(self, run: int) -> bool:
        """Whether the step size is to be adapted after the ``run``-th run, from 1 on."""
        often = max(1, self.every // _MORE_OFTEN)
        return run % (often if run < _EARLY * self.every else self.every) == 0 or (run < often and run & (run - 1) == 0)

    @torch.no_grad()
    def adapt(self, density: Density, state: Tensor, dynamics: Dynamics, num_steps: int) -> None:
        """Move the step sizes of ``dynamics`` once, by proposals from ``state``, ``(chains, rows, size)``."""
        for _ in range(_AT_ONCE):  # a decoder may sharpen faster than single moves follow
            acceptance = _acceptances(density, state, dynamics, num_steps)
            _move(dynamics, acceptance - self.target)
            self.last = acceptance.mean().item()
            if bool((acceptance > self.target - _NEAR).all()):
                break

    @torch.no_grad()
    def search(self, density: Density, state: Tensor, dynamics: Dynamics, num_steps: int) -> None:
        """Lower the step sizes until the acceptance at ``state`` is near the target."""
        for _ in range(_TRIES):
            missing = self.target - _acceptances(density, state, dynamics, num_steps)
            if bool((missing < _NEAR).all()):
                break
            _move(dynamics, -missing.clamp(min=0))


def _move(dynamics: Dynamics, by: Tensor) -> None:
    step_size = dynamics.step_size
    value = step_size.current * (_GAIN * by).exp()
    step_size.assign(value.clamp(_LEAST * step_size.max, _MOST * step_size.max))


def _acceptances(density: Density, state: Tensor, dynamics: Dynamics, num_steps: int) -> Tensor:
    """Mean acceptance of a step of all coordinates, ``(1,)``, or of those of each site, ``(sites,)``."""
    layout, by_site = density.layout, dynamics.step_size.per == "site"
    eta = dynamics.step_size(layout, num_steps).mean(0)
    here = Position(state, *density.value_and_grad(state))
    index = site_index(layout) if by_site else torch.zeros(layout.size, dtype=torch.long)
    groups = ((index == i).nonzero().squeeze(-1).to(state.device) for i in index.unique())
    return torch.stack([_acceptance(density, dynamics, here, eta, own) for own in groups])


def _acceptance(density: Density, dynamics: Dynamics, here: Position, eta: Tensor, own: Tensor) -> Tensor:
    """Mean acceptance of a Langevin step of the coordinates ``own``, the others staying where they are."""
    layout = density.layout
    langevin, scale, eta = Langevin(max_drift=dynamics.max_drift), layout.drift_scale(here.u)[own], eta[own]
    u, pull = here.u[..., own], here.pull[..., own]
    proposal = here.u.index_copy(-1, own, langevin.step(u, pull, eta, torch.randn_like(u), scale))
    there = Position(proposal, *density.value_and_grad(proposal))
    weight = layout.row_weight  # a row of a subsampled plate counts several times in the log density
    begin, end = (Position(p.u[..., own], p.log_density / weight, p.pull[..., own]) for p in (here, there))
    ratio = hastings_log_ratio(langevin, begin, end, eta, scale)
    finite = there.log_density.isfinite() & there.pull.isfinite().all(-1)
    probability = decide(ratio, finite, torch.zeros_like(ratio)).probability
    known = here.log_density.isfinite() & here.pull.isfinite().all(-1)
    return (probability * known).sum() / known.sum().clamp(min=1)
