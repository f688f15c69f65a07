"""What determines the answers under a router, besides the requests."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.evaluation.conditions import Conditions, scoring_code
from harness.registry.packs import Members, pool_id
from harness.source_code import Code, changes, digest, router_code
from phatgoose.errors import listed
from phatgoose.pool import known_expert
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import needs_profiles
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.single import Single


@dataclass
class Identity:
    """The identity of answers: conditions, experts, and the router with its code.

    Attributes:
        conditions: the conditions of the answers.
        members: the pool's experts, in its order, and their profiles if a router uses them.
        others: content hashes of experts outside the pool, by name.
    """

    conditions: Conditions
    members: Members
    others: Mapping[str, str]
    _codes: dict[str, Code] = field(default_factory=dict)

    def members_of(self, router: Router) -> Members:
        """Return the experts that an actor must attach for a router: all, or the one it names.

        `NoExpert` ignores the pool, so attach any single expert.
        """
        if isinstance(router, NoExpert):
            return Members(dict([next(iter(self.members.experts.items()))]))
        if isinstance(router, Single):
            known = {**self.members.experts, **self.others}
            return Members({router.expert: known[known_expert(router.expert, list(known))]})
        if needs_profiles([router]):
            return self.members
        return Members(self.members.experts)

    def of(self, name: str, router: Router, description: str) -> str:
        """Return a hash of what determines the answers under a router to a task's requests.

        Other experts do not affect that of a single expert.

        Args:
            name: the router's name in results.
            router: the router.
            description: the task's description.
        """
        members = self.members_of(router)
        content: list[Any] = [
            name,
            asdict(self.conditions),
            "" if isinstance(router, NoExpert) else pool_id(members.experts),
            f"{type(router).__module__}.{type(router).__qualname__}",
            options_of(router),
            digest(self.code(router)),
            members.profiles,
        ]
        if "descriptions" in all_needs(router):
            content.append(description)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def code(self, router: Router) -> Code:
        """Return the hashes of the router's own source code."""
        named = repr(router)
        if named not in self._codes:
            self._codes[named] = router_code(router)
        return self._codes[named]

    def record(self, router: Router) -> dict[str, Any]:
        """Return what determines the answers under a router, for people to compare."""
        conditions = {k: v for k, v in asdict(self.conditions).items() if k != "code"}
        return {
            **conditions,
            "options": options_of(router),
            "code": {**scoring_code(), **self.code(router)},
        }


def what_changed(before: Any, now: Mapping[str, Any]) -> str:
    """Return what differs between two records; empty if nothing does or nothing was recorded."""
    if not isinstance(before, dict) or not isinstance(before.get("code"), dict):
        return ""
    names = [name for name in now if name != "code" and before.get(name) != now[name]]
    return listed(names + changes(before["code"], now["code"]))


def options_of(router: Router) -> dict[str, Any]:
    """Return a router's options by name."""
    return asdict(router)  # type: ignore[call-overload]  # all routers are dataclasses
