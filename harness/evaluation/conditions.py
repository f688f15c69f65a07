"""The conditions of an answer: what determines it besides prompts, experts and router."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass

from harness.source_code import SCORING, Code, code_of, digest
from phatgoose.card import DTYPES
from phatgoose.errors import PhatgooseError
from phatgoose.ops.frozen_linear import library
from phatgoose.ops.routed import way_on

_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Conditions:
    """The conditions that all answers of a run share. Answers under others are not comparable.

    Attributes:
        base: the base's fingerprint.
        dtype: the dtype of the base.
        device: the kind of device that answers: `cpu`, `cuda` or `mps`.
        versions: the versions of the libraries that compute answers, as JSON; what routes and
            mixes, a kernel's build or PyTorch; and what multiplies by frozen weights.
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
        ways = {"mix": way_on(device, DTYPES[dtype]), "linear": library()}
        versions = {**json.loads(library_versions()), **ways}
        code = digest(scoring_code())
        return Conditions(base, dtype, device, json.dumps(versions, sort_keys=True), code)

    def describe(self) -> str:
        """Return what routes, mixes, and multiplies by frozen weights, in words."""
        versions = json.loads(self.versions)
        way = " ".join(versions["mix"].split()[:2])  # without the digest of its source
        return f"experts by {way}, frozen weights by {versions['linear']}"

    def check(self, dtype: str, device: str) -> None:
        """Raise PhatgooseError if this process, an actor, would answer under other conditions."""
        here = Conditions.here(self.base, dtype, device)
        for name, planned in asdict(self).items():
            found = getattr(here, name)
            if found != planned:
                raise PhatgooseError(
                    f"{name}={found}: the run was planned with {planned}, so this node's answers "
                    "could not be compared. Install the same versions on every node, and set "
                    "cluster.gpus_per_actor. Where processors differ, set PHATGOOSE_MIX=torch "
                    "and PHATGOOSE_LINEAR=torch."
                )


def library_versions(*others: str) -> str:
    """Return the versions of the libraries that compute answers, and of `others`, as JSON.

    Build labels, such as that of CUDA, are left out.
    """
    names = (*_LIBRARIES, *others)
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    return json.dumps(found, sort_keys=True)


def scoring_code() -> Code:
    """Return the hashes of the source code that scores and generates, without any router."""
    return code_of(SCORING)
