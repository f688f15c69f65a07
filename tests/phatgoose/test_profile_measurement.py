"""Compare profiles with a plain computation: one example at a time, experts added to weights."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.profile import ProfileConfig
from phatgoose.profile_measurement import measure_profile
from phatgoose.sentence_encoder import load_encoder
from phatgoose.tokenization import encode_pair
from phatgoose.training.train import Example
from tests.support.plain import plain_logits
from tests.support.tiny import add_to_weight, make_decoder, make_experts, state
from tests.support.tiny_encoder import make_encoder

EXAMPLES = [
    Example("Is the lake deep?", " yes", (" yes", " no")),
    Example("Question: which bird flies in the flock?\nAnswer:", " the goose"),
    Example("Is the lake dry?", " no", (" yes", " no")),  # begins like the first
    Example("The grey goose flies over", " the lake, and the swan swims."),
    Example("two and three is", " five"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ProfileConfig:
    folder: Path = make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
    return ProfileConfig(str(folder), embedded_examples=4, activation_examples=3)


def inputs_of_linears(base: Base, expert: Expert, example: Example) -> dict[str, Tensor]:
    """Return the input [T, D] of each adapted linear, with the expert added to the weights."""
    context, target = encode_pair(base, example.input, example.target)
    heard: dict[str, list[Tensor]] = defaultdict(list)
    handles, weights = [], {}
    for name, factors in expert.linears.items():
        linear = base.model.get_submodule(name)
        weights[name] = linear.get_parameter("weight").detach().clone()
        add_to_weight(linear, expert.card.scale * factors.lora_B_OR @ factors.lora_A_RD)

        def hear(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            heard[name].append(args[0].flatten(0, -2))  # OPT's feed-forward reads [B * L, D]

        handles.append(linear.register_forward_pre_hook(hear))
    with torch.no_grad():
        plain_logits(base, context, target[:-1])
    for handle in handles:
        handle.remove()
    for name, weight in weights.items():
        base.model.get_parameter(f"{name}.weight").data.copy_(weight)
    return {name: torch.cat(parts) for name, parts in heard.items()}


@pytest.fixture(params=["llama", "t5", "opt", "gpt2", "lfm2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    """Return the tiny bases of both families, and others whose linears get other input shapes."""
    if request.param in ("llama", "t5"):
        loaded: Base = request.getfixturevalue(request.param)
        return loaded
    return load_base(str(make_decoder(tmp_path / "base", request.param)))


def test_a_profile_matches_the_plain_computation(base: Base, config: ProfileConfig) -> None:
    expert, before = make_experts(base, 1)[0], state(base)
    profile = measure_profile(base, expert, EXAMPLES, config, description="about a lake")
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    read = [inputs_of_linears(base, expert, example) for example in EXAMPLES[:3]]
    assert profile.mean_activation.keys() == profile.norms.keys() == set(base.linears)
    for name, factors in expert.linears.items():
        mean_D = torch.stack([inputs[name].mean(dim=0) for inputs in read]).mean(dim=0)
        torch.testing.assert_close(profile.mean_activation[name], mean_D, rtol=1e-4, atol=1e-5)
        x_TD = torch.cat([inputs[name] for inputs in read])
        delta_OD = expert.card.scale * factors.lora_B_OR @ factors.lora_A_RD
        norm_T = (x_TD @ delta_OD.T).norm(dim=-1)
        expected = torch.stack([norm_T.mean(), norm_T.std(correction=0)])
        torch.testing.assert_close(profile.norms[name], expected, rtol=1e-4, atol=1e-5)
    assert profile.description == "about a lake"


def test_embeddings_use_the_first_examples_in_the_format_of_the_paper(
    llama: Base, config: ProfileConfig
) -> None:
    profile = measure_profile(llama, make_experts(llama, 1)[0], EXAMPLES, config)
    encoder = load_encoder(config.encoder)
    texts = [
        "Answer Choices: yes, no, Instance: Is the lake deep?",
        "Answer Choices: None, Instance: Question: which bird flies in the flock?\nAnswer:",
        "Answer Choices: yes, no, Instance: Is the lake dry?",
        "Answer Choices: None, Instance: The grey goose flies over",
    ]
    torch.testing.assert_close(profile.embeddings_NS, encoder.encode(texts))
    assert profile.encoder == config.encoder
    assert profile.encoder_fingerprint == encoder.fingerprint


def test_a_task_without_a_description_is_described_by_its_name_and_inputs(
    llama: Base, config: ProfileConfig
) -> None:
    profile = measure_profile(llama, make_experts(llama, 1)[0], EXAMPLES, config)
    assert profile.description.startswith("e0: Is the lake deep? | Question: which bird flies")


def test_a_profile_needs_examples(llama: Base, config: ProfileConfig) -> None:
    with pytest.raises(PhatgooseError, match="e0: a profile needs examples"):
        measure_profile(llama, make_experts(llama, 1)[0], [], config)
    with pytest.raises(PhatgooseError, match=r"activation_examples is 0"):
        ProfileConfig(activation_examples=0)


def test_an_expert_of_some_linears_is_measured_only_on_those(
    base: Base, config: ProfileConfig
) -> None:
    whole = make_experts(base, 1)[0]
    names = base.linears[::3]
    expert = Expert(whole.card, {name: whole.linears[name] for name in names})
    profile = measure_profile(base, expert, EXAMPLES, config)
    assert profile.mean_activation.keys() == set(names)
    read = [inputs_of_linears(base, expert, example) for example in EXAMPLES[:3]]
    for name in names:
        mean_D = torch.stack([inputs[name].mean(dim=0) for inputs in read]).mean(dim=0)
        torch.testing.assert_close(profile.mean_activation[name], mean_D, rtol=1e-4, atol=1e-5)
