"""The language of posteriors_models.py: Pyro on torch, or NumPyro on JAX if the environment has ``PROGRAMS=numpyro``.

``np`` has only what both array libraries call by the same name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

if os.environ.get("PROGRAMS") == "numpyro":
    import jax
    import jax.numpy as np
    import numpyro as pyro
    import numpyro.distributions as dist
    from jax.scipy.special import logsumexp
    from numpyro.distributions import constraints

    def scan(step: Callable, state: Any, count: int) -> Any:
        """States after each of ``count`` steps, the steps along the last axis but one."""
        return np.moveaxis(jax.lax.scan(lambda x, _: (step(x),) * 2, state, None, count)[1], 0, -2)

    Flat = dist.ImproperUniform

else:
    import pyro
    import pyro.distributions as dist
    import torch as np
    from pyro.distributions import constraints
    from torch import logsumexp
    from torch.distributions import biject_to

    def scan(step: Callable, state: Any, count: int) -> Any:
        states = []
        for _ in range(count):
            states.append(state := step(state))
        return np.stack(states, -2)

    class Flat(dist.ImproperUniform):
        """With draws, as AutoGuides and NUTS begin at one: uniform on (-2, 2) before the transform, as in Stan."""

        def sample(self, sample_shape: tuple[int, ...] = ()) -> Any:
            return biject_to(self.support)(4 * np.rand(self.shape(sample_shape)) - 2)


__all__ = ["Flat", "constraints", "dist", "logsumexp", "np", "pyro", "scan"]
