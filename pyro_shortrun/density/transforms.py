"""Transforms from unconstrained space: log-Jacobians, and comparisons, which torch has for some classes only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform


def log_jacobians(
    nodes: Mapping[str, Any], transforms: Mapping[str, Transform], unconstrained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``log |dz/du|`` over the batch shape of each latent site whose transform is not the identity.

    :param nodes: trace nodes by name.
    :raises NotImplementedError: for a support that has more dimensions than the site.
    """
    found = {}
    for name, u in unconstrained.items():
        if not is_identity(transforms[name]):
            value = nodes[name]["value"]
            if value.dim() - transforms[name].codomain.event_dim > u.dim() - transforms[name].domain.event_dim:
                raise NotImplementedError(
                    f"the support of latent site {name!r} depends on a site that is enumerated: give it one that does "
                    "not, such as a fixed interval that the model scales."
                )
            term = transforms[name].log_abs_det_jacobian(u, value)
            found[name] = sum_rightmost(term, term.dim() - value.dim() + nodes[name]["fn"].event_dim)
    return found


def is_identity(transform: Transform) -> bool:
    """Whether a transform surely leaves everything as it is."""
    if isinstance(transform, IndependentTransform):
        return is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def same_transform(a: Transform, b: Transform) -> bool:
    """Whether two transforms are the same map. A False may be wrong for classes from elsewhere, a True is not."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ComposeTransform) and isinstance(b, ComposeTransform):
        return len(a.parts) == len(b.parts) and all(map(same_transform, a.parts, b.parts))
    if isinstance(a, IndependentTransform) and isinstance(b, IndependentTransform):
        dims = a.reinterpreted_batch_ndims == b.reinterpreted_batch_ndims
        return dims and same_transform(a.base_transform, b.base_transform)
    if type(a).__eq__ is not Transform.__eq__:
        return bool(a == b)
    # A class without parameters: the domain and codomain are the class's, and nothing else hangs on the object.
    return not any(isinstance(v, (Tensor, Transform, float, list, tuple)) for v in vars(a).values())
