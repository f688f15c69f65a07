"""Tiny random bases as local directories, and random experts for them: real files, no network.

    make_llama(folder)   decoder only, grouped-query attention, byte-level BPE without padding token
    make_t5(folder)      encoder and decoder, gated GELU, a Unigram tokenizer that ends with </s>

Both are the same bits for the same arguments, in every process.
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

from phatgoose.base import Base
from phatgoose.expert import Card, Expert, LoraFactors

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
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(AutoModelForSeq2SeqLM.from_config(config), tokenizer, folder, tied=tied, seed=seed)


def build(kind: str, **sizes: Any) -> PreTrainedModel:
    """A random model of an architecture, as transformers starts it."""
    config = AutoConfig.for_model(kind, **sizes)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = family.from_config(config)
    return model


def decoder_sizes(kind: str) -> dict[str, int]:
    """Tiny sizes, by the names that every decoder of `ADAPTED_LINEARS` has for them."""
    sizes = {"vocab_size": 340, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return sizes if kind == "gpt_neox" else {**sizes, "num_key_value_heads": 1, "head_dim": 8}


def llama_tokenizer(*, start: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: a space belongs to the word after it. `start`: puts <s> first."""
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
    """Unigram over words and letters as sentencepiece's: a word starts with its space.

    `end`: puts </s> last, as T5's does and a decoder's does not.
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
    """Random experts `e0`, `e1`, ... of a base, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    experts = []
    for index in range(count):
        linears = {}
        for name in base.linears:
            linear = base.model.get_submodule(name)
            outputs, inputs = linear.weight.shape
            linears[name] = LoraFactors(
                lora_A_RD=random(rank, inputs) / inputs**0.5,
                lora_B_OR=random(outputs, rank),
                gate_D=random(inputs) if gates else None,
            )
        experts.append(Expert(make_card(f"e{index}", base, scale=1 / (index + 2)), linears))
    return experts


def make_card(name: str, base: Base, *, scale: float = 1 / 16) -> Card:
    """A card of an expert of a base that was trained on nothing."""
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


def state(base: Base) -> dict[str, Tensor]:
    """A copy of a base's weights, to compare bit by bit later."""
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def with_tokenizer(base: Base, tokenizer: PreTrainedTokenizerFast) -> Base:
    """The same base with another tokenizer, whose tokens it need not know."""
    return dataclasses.replace(base, tokenizer=tokenizer)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    tied: bool,
    seed: int,
) -> Path:
    if not tied:  # transformers makes every T5 tied, but reads one whose file has both matrices
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    generator = torch.Generator().manual_seed(seed)
    weights = dict(sorted(model.named_parameters()))
    for name, weight in weights.items():
        # Larger than a start for training, so that what the base says depends on what it reads.
        centre, spread = (1.0, 0.1) if "norm" in name else (0.0, weight.shape[-1] ** -0.5)
        weight.data = centre + spread * torch.randn(weight.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
