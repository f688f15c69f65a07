"""Measure the profile of an expert on the data of its task."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.tasks.store import read_records
from harness.training.examples import to_example
from phatgoose.base import Base
from phatgoose.expert import Expert
from phatgoose.profile import ProfileConfig
from phatgoose.profile_measurement import measure_profile

if TYPE_CHECKING:
    from harness.tasks import TaskData


def expert_profile(
    base: Base,
    expert: Expert,
    data: "TaskData",
    config: ProfileConfig,
    beat: Callable[[], None] = lambda: None,
) -> bytes:
    """Measure the profile of an expert on the first training examples of its task."""
    most = max(config.embedded_examples, config.activation_examples)
    examples = [to_example(record) for record in read_records(data.train, most)]
    profile = measure_profile(
        base, expert, examples, config, description=data.description, beat=beat
    )
    return profile.to_bytes()
