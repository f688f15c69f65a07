"""Check every record: adapted linears, training, routing, and refusals."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from phatgoose.architecture import ARCHITECTURES, Architecture, adapted_linears
from phatgoose.base import Base, bare_model, last_query_projection, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.scoring import score
from phatgoose.pool import Pool
from phatgoose.training.engine import TargetLoss
from phatgoose.training.gated_lora import attach_lora, detach_lora
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import CurveRow, Example, Hooks, train_expert
from tests.support.architectures import (
    DECODERS,
    QUESTIONS,
    Folders,
    assert_answers_plainly,
    assert_plain,
)
from tests.support.plain import plain_logits
from tests.support.textbook import RULES, base_plus, base_with, facts_of
from tests.support.tiny import (
    build,
    decoder_sizes,
    make_card,
    make_decoder,
    make_experts,
    make_t5,
    state,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    return Folders(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", DECODERS)
def test_experts_reach_every_linear(folders: Folders, name: str) -> None:
    """Check that routed and merged experts match the textbook, and training reaches each linear."""
    base = folders.load(*DECODERS[name])
    experts = make_experts(base, 3)
    routed = RoutedModel(base, Pool.from_experts(experts), "phatgoose")
    facts = {linear: facts_of(experts, linear) for linear in base.linears}
    dense = base_with(base, lambda linear, x_D: RULES["phatgoose"].added(x_D, facts[linear]))
    assert_plain(dense, routed.score(QUESTIONS))
    routed.set_router("merged")
    means = {
        linear: torch.stack(
            [
                e.card.scale * e.linears[linear].lora_B_OR @ e.linears[linear].lora_A_RD
                for e in experts
            ]
        ).mean(dim=0)
        for linear in base.linears
    }
    assert_plain(base_plus(base, means), routed.score(QUESTIONS))
    routed.detach()

    layers = attach_lora(base.model, base.linears, rank=2, scale=1.0, init_std=0.1, seed=0)
    TargetLoss(base, "float32")(QUESTIONS).backward()
    for linear, layer in layers.items():
        assert layer.lora_B_OR.grad is not None, linear
        assert float(layer.lora_B_OR.grad.abs().max()) > 0, linear
    trained = {n for n, p in base.model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(base.linears)
    detach_lora(base.model, layers)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "falcon", "mpt", "lfm2", "mixtral"])
def test_an_expert_and_its_gates_are_trained(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    before = state(base)
    words = ["goose", "swan", "lake", "bird", "flock", "two"]
    train = [Example(f"the grey {word} is", f" {word}") for word in words]
    recipe = Recipe(
        rank=2,
        scale=1.0,
        init_std=0.1,
        lora=Stage(steps=12, lr=3e-2),
        gates=Stage(steps=4, lr=1e-1),
        batch_size=6,
        micro_batch_size=3,
        evaluation_examples=2,
        dtype="float32",
    )
    rows: list[CurveRow] = []
    expert = train_expert(
        base, make_card("e", base), train, train[:2], recipe, Hooks(report=rows.append)
    )
    losses = [row.loss for row in rows if (row.stage, row.split) == ("lora", "train")]
    assert losses[-1] < 0.9 * losses[0]
    assert expert.linears.keys() == set(base.linears)
    for linear, factors in expert.linears.items():
        assert factors.gate_D is not None
        assert factors.gate_D.shape == factors.lora_A_RD.shape[1:]
        assert float(factors.gate_D.abs().max()) > 0, linear
    after = base.model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_query_projection_is_probed(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    found = last_query_projection(base, base.linears)
    assert found is not None
    assert found.split(".")[-1] in ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
    assert ".1." in found
    assert last_query_projection(base, [n for n in base.linears if ".0." in n]) != found
    heard: list[torch.Tensor] = []
    linear = base.model.get_submodule(found)
    handle = linear.register_forward_pre_hook(lambda _, args: heard.append(args[0][0, -1]))
    for question in QUESTIONS:
        plain_logits(base, question.context, [])
    handle.remove()
    routed = RoutedModel(base, Pool.from_experts(make_experts(base)))
    with torch.inference_mode():
        x_QD = routed._probe([question.context for question in QUESTIONS])
    torch.testing.assert_close(x_QD, torch.stack(heard), rtol=1e-4, atol=1e-5)


_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "koqv")
_MLP = tuple(f"mlp.{x}_proj" for x in ("down", "gate", "up"))
_FUSED = ("query_key_value", "dense"), ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
LINEARS = {
    **dict.fromkeys(ARCHITECTURES.keys() - {"t5", "mt5"}, (*_MLP, *_ATTENTION)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _ATTENTION),
    **dict.fromkeys(("falcon", "bloom"), (*_FUSED[1], *(f"self_attention.{x}" for x in _FUSED[0]))),
    "gpt_neox": (*_FUSED[1], *(f"attention.{x}" for x in _FUSED[0])),
    "phi3": ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
    "phi": ("mlp.fc1", "mlp.fc2", "self_attn.dense", *(f"self_attn.{x}_proj" for x in "kqv")),
    "opt": ("fc1", "fc2", *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v"))),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "mpt": ("attn.Wqkv", "attn.out_proj", "ffn.down_proj", "ffn.up_proj"),
    "lfm2": (
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
        *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v")),
    ),
}


@pytest.mark.parametrize("kind", sorted(LINEARS))
def test_a_record_names_every_linear_of_a_layer(kind: str) -> None:
    linears = adapted_linears(build(kind, **decoder_sizes(kind)))
    second = [name.split(".1.")[1] for name in linears if ".1." in name]
    assert sorted(second) == sorted(LINEARS[kind])
    first = [name.split(".0.")[1] for name in linears if ".0." in name]
    if kind == "lfm2":
        assert sorted(first)[:2] == ["conv.in_proj", "conv.out_proj"]
    else:
        assert first == second
    assert len(first) + len(second) == len(linears)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize(("form", "feed_forward"), [("gated-gelu", 3), ("relu", 2)])
def test_linears_of_t5_have_the_expected_sides(kind: str, form: str, feed_forward: int) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    linears = adapted_linears(build(kind, **sizes, num_heads=2, feed_forward_proj=form))
    # Two layers each: self-attention (4), in the decoder cross-attention (4), feed-forward.
    assert len(linears) == 2 * (4 + feed_forward) + 2 * (8 + feed_forward)
    assert not any("lm_head" in name or "relative" in name for name in linears)
    read_encoder = [n for n in linears if ARCHITECTURES[kind].side_of(n) == "encoder"]
    of_decoder = [n for n in read_encoder if n.startswith("decoder.")]
    assert len(read_encoder) == 2 * (4 + feed_forward) + 4
    assert {n.split(".")[-2:][0] + n[-2:] for n in of_decoder} == {
        "EncDecAttention.k",
        "EncDecAttention.v",
    }


@pytest.mark.parametrize(
    ("name", "count", "places"),
    [
        (
            "mixtral",
            2 * (3 * 16 + 3 * 48 * 16 + 3 * 16 * 24),
            ["gate", "gate_up_proj", "down_proj"],
        ),
        ("qwen3_moe", 2 * (3 * 16 + 3 * 16 * 16 + 3 * 16 * 8), ["experts.down_proj"]),
        ("opt with projections", 2 * 8 * 16, ["project_in", "project_out"]),
        ("lfm2", 16 * 3, [r"layers\.\*\.conv\.conv\.weight"]),
        ("llama", 0, []),
        ("gpt2", 0, []),
        ("t5", 0, []),
    ],
)
def test_weights_that_no_expert_adapts_are_reported(
    folders: Folders,
    t5_folder: Path,
    name: str,
    count: int,
    places: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        base = load_base(str(t5_folder)) if name == "t5" else folders.load(*DECODERS[name])
        loaded, total = caplog.text, sum(p.numel() for p in base.model.parameters())
        caplog.clear()
        bare, linears = bare_model(base.name, Path(base.name))  # as in the plan
    assert bare.device.type == "meta"
    assert linears == base.linears
    for text in (loaded, caplog.text):
        lines = [line for line in text.splitlines() if "no expert adapts" in line]
        assert len(lines) == (count > 0)
        for line in lines:
            assert f"base={base.name}: no expert adapts {count:,} of its {total:,} " in line
            assert all(re.search(place, line) for place in places)


def refused(folder: Path) -> list[str]:
    """Return the error of loading, which must equal that of planning with the bare base."""
    said = []
    for attempt in (lambda: load_base(str(folder)), lambda: bare_model(str(folder), folder)):
        with pytest.raises(PhatgooseError) as raised:
            attempt()
        said.append(str(raised.value))
        assert said[-1].startswith(f"base={folder}: ")
        assert "\n" not in said[-1]
    return said


def test_the_error_for_an_unknown_architecture_explains_what_to_add(tmp_path: Path) -> None:
    build("stablelm", **decoder_sizes("stablelm")).save_pretrained(tmp_path)
    for line in refused(tmp_path):
        assert "model_type=stablelm: there is no record of this architecture" in line
        assert "(known: bloom, falcon, gemma, " in line
        assert "Add one to ARCHITECTURES in phatgoose/architecture.py: 'stablelm'" in line


def test_an_architecture_is_added_by_adding_a_record(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Architecture(linears=ARCHITECTURES["llama"].linears, query=r"self_attn\.q_proj")
    monkeypatch.setitem(ARCHITECTURES, "stablelm", record)
    base = folders.load("stablelm", {})
    assert len(base.linears) == 14
    assert base.shares_context
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 4)


def test_a_record_with_missing_linears_is_an_error() -> None:
    model = build("llama", **decoder_sizes("llama"))
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(PhatgooseError, match=r"14 linears and leaves out 1 .*1\.mlp\.extra"):
        adapted_linears(model)
    del model.model.layers
    with pytest.raises(PhatgooseError, match="it has none"):
        adapted_linears(model)


def test_bart_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{side}_{x}": 2 for side in ("encoder", "decoder") for x in ("attention_heads",)}
    build("bart", **sizes, encoder_ffn_dim=16, decoder_ffn_dim=16).save_pretrained(tmp_path)
    for line in refused(tmp_path):
        assert "model_type=bart: of encoders with a decoder only T5's are supported" in line
        assert line.endswith("Give a T5-like base, or a decoder-only one.")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantized_base_is_refused(tmp_path: Path, method: str) -> None:
    make_decoder(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for line in refused(tmp_path):
        assert "the weights are quantized" in line
        assert "float32, bfloat16 or float16" in line


def test_a_model_with_integer_weights_is_refused(llama: Base) -> None:
    linear = llama.model.get_submodule(llama.linears[3])
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PhatgooseError, match=rf"{llama.linears[3]} is quantized \(torch\.int8\)"):
        adapted_linears(llama.model)


def test_an_unknown_configuration_gives_a_one_line_error(tmp_path: Path) -> None:
    make_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    for line in refused(tmp_path):
        assert "transformers cannot read its config.json" in line
