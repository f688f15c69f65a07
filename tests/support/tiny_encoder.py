"""A tiny random sentence encoder as a local directory: real files, no network.

    make_encoder(folder)   BERT, mean pooling without a normalizing module, reads 16 tokens

The same arguments give identical files in every process. Words of `tests.support.tiny.SENTENCES`
are one token each; others are spelled in letters.
"""

import json
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from tests.support.tiny import SENTENCES

MAX_TOKENS = 16
DIMENSIONS = 32
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a tiny sentence encoder into `folder`, and return it."""
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIMENSIONS,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    generator = torch.Generator().manual_seed(seed)
    weights = dict(sorted(model.named_parameters()))
    for name, weight in weights.items():
        # Words outweigh what all texts share, so that texts are distinguishable.
        center, spread = (1.0, 0.1) if "LayerNorm.weight" in name else (0.0, 0.1)
        if "word_embeddings" in name:
            spread = 1.0
        weight.data = center + spread * torch.randn(weight.shape, generator=generator)
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    # Its additional files, as in the packaged encoder.
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    settings = {
        "config.json": {**config.to_dict(), "architectures": ["BertModel"]},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
    }
    for file, content in settings.items():
        (folder / file).write_text(json.dumps(content))
    set_pooling(folder, "mean_tokens")
    return folder


def set_pooling(folder: Path, mode: str) -> None:
    """Set how an encoder's directory pools tokens into one vector: `mean_tokens`, `cls_token`."""
    modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "mean_tokens", "max_tokens")}
    config = {"word_embedding_dimension": DIMENSIONS, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def _tokenizer() -> BertTokenizer:
    letters = string.ascii_lowercase + string.digits
    words = {w.strip(string.punctuation).lower() for text in SENTENCES for w in text.split()}
    tokens = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    tokens += sorted(words - set(tokens) - {""})
    return BertTokenizer(vocab={token: i for i, token in enumerate([*_SPECIAL, *tokens])})
