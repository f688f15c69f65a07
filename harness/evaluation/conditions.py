"""What an answer is computed with, besides the prompts, the experts and the router."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass

from harness.source_code import SCORING, Code, code_of, digest
from phatgoose.errors import PhatgooseError

_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Conditions:
    """What all answers of a run have in common: only answers under the same can be compared.

    Attributes:
        base: the base's fingerprint.
        dtype: of the base.
        device: the kind of device that answers: `cpu`, `cuda` or `mps`.
        versions: of the libraries that compute answers, as JSON.
        code: a hash of the source code that scores and generates.
    """

    base: str
    dtype: str
    device: str
    versions: str
    code: str

    @staticmethod
    def here(base: str, dtype: str, device: str) -> "Conditions":
        """Return the conditions with the libraries and the code of this process."""
        return Conditions(base, dtype, device, library_versions(), digest(scoring_code()))

    def check(self, dtype: str, device: str) -> None:
        """Raise PhatgooseError, on an actor, if it would answer under other conditions."""
        here = Conditions.here(self.base, dtype, device)
        for name, planned in asdict(self).items():
            found = getattr(here, name)
            if found != planned:
                raise PhatgooseError(
                    f"this node would answer with {name} {found}, and the run was planned with "
                    f"{planned}: its numbers could not be compared. Install the same versions on "
                    "every node, and set cluster.gpus_per_actor."
                )


def library_versions(*others: str) -> str:
    """Return the versions of the libraries that compute answers, and of others, as JSON.

    Build labels, such as that of CUDA, are left out.
    """
    names = (*_LIBRARIES, *others)
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    return json.dumps(found, sort_keys=True)


def scoring_code() -> Code:
    """Return the source code that scores and generates, whatever the router."""
    return code_of(SCORING)
