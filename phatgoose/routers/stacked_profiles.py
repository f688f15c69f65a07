"""Stack what routers read from the experts' profiles, in the order of the pool.

Shape suffixes: E experts, D input features, N examples, S embedding features, Q queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.pool import Pool
from phatgoose.profile import Profile

# Embeddings made in this process, by the encoder's fingerprint and the text.
_embedded: dict[str, dict[str, Tensor]] = {}
_MOST_EMBEDDED = 100_000


def mean_activations(pool: Pool, linear: str) -> Tensor:
    """Return each expert's mean input of one linear, float32 [E, D], on the pool's device."""
    like = pool.linears[linear].lora_A_ERD
    nothing_D = torch.zeros(like.shape[2])  # of an expert that does not adapt this linear
    means = [p.mean_activation.get(linear, nothing_D) for p in _profiles(pool)]
    return torch.stack(means).to(like.device)


def norms(pool: Pool, linear: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each float32 [E], of the norm of what each expert adds."""
    nothing = torch.tensor([0.0, 1.0])
    norm_E2 = torch.stack([p.norms.get(linear, nothing) for p in _profiles(pool)])
    norm_E2 = norm_E2.to(pool.linears[linear].lora_A_ERD.device)
    return norm_E2[:, 0], norm_E2[:, 1]


def embeddings(pool: Pool) -> list[Tensor]:
    """Each expert's embedded training examples, [N, S]."""
    return [profile.embeddings_NS for profile in _profiles(pool)]


def descriptions(pool: Pool) -> list[str]:
    """Return the description of each expert's task."""
    return [profile.description for profile in _profiles(pool)]


def embed(pool: Pool, texts: Sequence[str]) -> Tensor:
    """Embed texts with the encoder that made the profiles' embeddings, [Q, S].

    Raises:
        PhatgooseError: the encoder of that name is another one here.
    """
    from phatgoose.sentence_encoder import load_encoder  # slow to import

    profile = _profiles(pool)[0]
    encoder = load_encoder(profile.encoder)
    if encoder.fingerprint != profile.encoder_fingerprint:
        raise PhatgooseError(
            f"the profiles were made with the encoder {profile.encoder} "
            f"{profile.encoder_fingerprint[:12]}, and here it is {encoder.fingerprint[:12]}: use "
            "the same files, or measure the profiles again"
        )
    # Routers ask about the same documents again and again.
    known = _embedded.setdefault(encoder.fingerprint, {})
    if len(known) > _MOST_EMBEDDED:
        known.clear()
    for text in texts:
        if text not in known:
            # Alone: in a batch the last bits would depend on what else is in it.
            known[text] = encoder.encode([text])[0]
    return torch.stack([known[text] for text in texts])


def _profiles(pool: Pool) -> tuple[Profile, ...]:
    assert pool.profiles is not None  # `check` was called
    return pool.profiles
