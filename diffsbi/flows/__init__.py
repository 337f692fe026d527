"""Conditional densities: smooth bijections, their inversion, constructors, and the one table of them all."""

import functools
from collections.abc import Callable

from flowjax.distributions import AbstractDistribution

from diffsbi._types import check_names
from diffsbi.flows.constructors import coupling, masked_autoregressive, smooth_flow, spline_flow
from diffsbi.flows.continuous import AngularFlow, continuous_flow
from diffsbi.flows.mixture import mixture_density
from diffsbi.flows.ramps import LogisticRamps

FLOWS: dict[str, Callable[..., AbstractDistribution]] = {
    "smooth": smooth_flow,
    "smooth_coupling": functools.partial(smooth_flow, kind="coupling"),
    "masked_autoregressive": masked_autoregressive,
    "coupling": coupling,
    "spline": spline_flow,
    "mixture": mixture_density,
    "continuous": continuous_flow,
}
NOT_SMOOTH = frozenset({"spline"})


def is_smooth(flow: str | Callable[..., AbstractDistribution]) -> bool:
    """True when the score of the flow is continuously differentiable.

    `flow` is a name, or a constructor or `functools.partial` of one; a constructor that is not in `FLOWS` is believed.
    """
    if isinstance(flow, str):
        check_names([flow], list(FLOWS), "flow")
        return flow not in NOT_SMOOTH
    while isinstance(flow, functools.partial):
        flow = flow.func
    return all(flow is not FLOWS[name] for name in NOT_SMOOTH)


__all__ = [
    "FLOWS",
    "NOT_SMOOTH",
    "AngularFlow",
    "LogisticRamps",
    "continuous_flow",
    "coupling",
    "is_smooth",
    "masked_autoregressive",
    "mixture_density",
    "smooth_flow",
    "spline_flow",
]
