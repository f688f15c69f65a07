"""Find the routers that the pool can serve after training, and what they need besides it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.extra_routers import MULTITASK, Multitask
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.registry.packs import Members
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router
from phatgoose.routers.interface import needs_profiles


@dataclass
class AvailableRouters:
    """The routers that can be evaluated.

    Attributes:
        routers: the routers, by their name in results.
        problems: the routers that are left out, and why.
        members: the pool's experts, and their profiles if a router uses them.
        others: content hashes of experts outside the pool, by name.
    """

    members: Members
    routers: dict[str, Router] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


def available_routers(
    plan: Plan, registry: Registry, experts: Mapping[str, str]
) -> AvailableRouters:
    """Return the routers that the existing experts and profiles can serve.

    The plan has checked what can be known before training. This function checks the result of
    training.

    Args:
        plan: the plan of the run.
        registry: the registry that stores the experts.
        experts: content hash by name, of the pool's experts that exist.

    Raises:
        PhatgooseError: no router is left.
    """
    profiles = _profiles(plan, registry, experts)
    served = AvailableRouters(Members(experts))
    multitask = plan.multitask and registry.finished(plan.multitask.card.job)
    if multitask:
        served.others[MULTITASK] = multitask
    lacking = ", ".join(name for name in experts if name not in profiles)
    for name, router in plan.config.routers(list(experts)).items():
        try:
            if isinstance(router, Multitask):
                if multitask is None:
                    raise PhatgooseError("its expert is not trained")
            else:
                router.check_experts(list(experts))
            if needs_profiles([router]):
                if lacking:
                    raise PhatgooseError(f"there is no profile of {lacking}")
                served.members = Members(experts, profiles)
        except PhatgooseError as error:
            served.problems.append(f"router {name} is left out: {error}")
            continue
        served.routers[name] = router
    if not served.routers:
        raise PhatgooseError("; ".join(served.problems))
    return served


def _profiles(plan: Plan, registry: Registry, experts: Mapping[str, str]) -> dict[str, str]:
    """Return the ids of the existing profiles, by expert."""
    ids = {job.card.name: job.profile_id for job in plan.jobs}
    there = registry.profiles()
    found = {name: ids[name] for name, content in experts.items() if (content, ids[name]) in there}
    return {name: profile_id for name, profile_id in found.items() if profile_id is not None}
