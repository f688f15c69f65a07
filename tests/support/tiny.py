"""Tiny random bases as local directories, and random experts for them: real files, no network.

    make_llama(folder)   decoder only, grouped-query attention, byte-level BPE without padding token
    make_t5(folder)      encoder and decoder, gated GELU, a Unigram tokenizer that ends with </s>
    make_decoder(folder, kind)    any decoder-only architecture, with the tokenizer of the first

The same arguments give identical files in every process.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from phatgoose.architecture import linear_sizes
from phatgoose.base import Base
from phatgoose.card import Card, LoraFactors
from phatgoose.expert import Expert

SENTENCES = [
    "Question: which bird flies in the flock?\nAnswer: the goose",
    "The grey goose flies over the lake, and the swan swims.",
    "Is the lake deep? yes. Is the lake dry? no.",
    "two and three is five; five and four is nine",
]
RANK = 4


def make_llama(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write a tiny Llama-like base into `folder`, and return it."""
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return _save(AutoModelForCausalLM.from_config(config), tokenizer, folder, tied=tied, seed=seed)


def make_t5(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write a tiny base like T5 1.1 into `folder`, and return it."""
    tokenizer = t5_tokenizer()
    # transformers accepts these without declaring them.
    more: dict[str, Any] = {
        "tie_word_embeddings": tied,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    return _save(AutoModelForSeq2SeqLM.from_config(config), tokenizer, folder, tied=tied, seed=seed)


def build(kind: str, **sizes: Any) -> PreTrainedModel:
    """Return a random model of an architecture, initialized by transformers."""
    config = AutoConfig.for_model(kind, **sizes)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = family.from_config(config)
    return model


# Sizes whose names differ from those in Llama's configuration.
_SIZES: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 128},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
}
_WITHOUT_GROUPS = ("gpt_neox", "opt", "phi", "falcon")


def decoder_sizes(kind: str) -> dict[str, Any]:
    """Return tiny sizes of a decoder-only architecture."""
    # Some tokenizers add a padding token when they are loaded.
    sizes: dict[str, Any] = {"vocab_size": 344, "pad_token_id": 0, "bos_token_id": 0}
    sizes |= {"eos_token_id": 0, **_SIZES.get(kind, {})}
    if kind in ("mpt", "bloom", "gpt2"):
        return sizes
    sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    if kind in _WITHOUT_GROUPS:
        return sizes
    return {**sizes, "num_key_value_heads": 1, "head_dim": 8}


def make_decoder(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a tiny base of a decoder-only architecture into `folder`, and return it."""
    model = build(kind, **{**decoder_sizes(kind), **changes})
    _randomize(dict(model.named_parameters()), seed=0)
    model.save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return folder


def llama_tokenizer(*, start: bool = False) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE like GPT-2's, with leading spaces in words. `start` puts <s> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<s>" if start else "<|end|>"
    )


def t5_tokenizer(*, end: bool = True) -> PreTrainedTokenizerFast:
    """Make a Unigram tokenizer over words and letters like sentencepiece's, with leading spaces.

    `end` puts </s> last, as T5's tokenizer does and a decoder's does not.
    """
    text = " ".join(SENTENCES)
    words = sorted({"▁" + word for word in text.split()})
    letters = sorted(set("▁" + text.replace(" ", "")) - set(words))
    scores = [(word, -5.0) for word in words] + [(letter, -20.0) for letter in letters]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]
    tokenizer = Tokenizer(models.Unigram([*specials, *scores], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_experts(
    base: Base, count: int = 3, *, rank: int = RANK, gates: bool = True, seed: int = 0
) -> list[Expert]:
    """Make random experts `e0`, `e1`, ... of a base, large enough to change its outputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    experts = []
    for index in range(count):
        linears = {}
        for name in base.linears:
            inputs, outputs = linear_sizes(base.model.get_submodule(name))
            linears[name] = LoraFactors(
                lora_A_RD=random(rank, inputs) / inputs**0.5,
                lora_B_OR=random(outputs, rank),
                gate_D=random(inputs) if gates else None,
            )
        experts.append(Expert(make_card(f"e{index}", base, scale=1 / (index + 2)), linears))
    return experts


def make_card(name: str, base: Base, *, scale: float = 1 / 16) -> Card:
    """Make a card of an untrained expert of a base."""
    return Card(
        name=name,
        task=name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        data_fingerprint="da7a" * 16,
        job=f"job-{name}",
        scale=scale,
        recipe={},
        metrics={},
    )


def add_to_weight(linear: nn.Module, delta_OD: Tensor) -> None:
    """Add a matrix to a linear's weight, which GPT-2 stores as [D, O]."""
    assert isinstance(linear, nn.Linear | Conv1D)
    linear.weight.data += delta_OD.T if isinstance(linear, Conv1D) else delta_OD


def state(base: Base) -> dict[str, Tensor]:
    """Return a copy of a base's weights, for an exact comparison later."""
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def with_tokenizer(base: Base, tokenizer: PreTrainedTokenizerFast) -> Base:
    """Return the same base with another tokenizer, whose tokens it need not know."""
    return dataclasses.replace(base, tokenizer=tokenizer)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    tied: bool,
    seed: int,
) -> Path:
    if not tied:  # transformers makes every T5 tied, but reads an untied one from both matrices
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    weights = dict(sorted(model.named_parameters()))
    _randomize(weights, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _randomize(weights: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        # Larger than an initialization for training, so that outputs depend on the input.
        is_norm = "norm" in name or ".ln_" in name
        center, spread = (1.0, 0.1) if is_norm else (0.0, weight.shape[-1] ** -0.5)
        weight.data = center + spread * torch.randn(weight.shape, generator=generator)
