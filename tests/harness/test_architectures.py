"""Check bases that differ from Llama, in the plan and in an evaluation actor."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig
from harness.evaluation.answering import answer_shard
from harness.evaluation.encoding import EncodedShard, encode
from harness.evaluation.shards import Request
from harness.scheduling.settings import BaseConfig
from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.routers import make_router
from phatgoose.tokenization import encode_context, encode_pair
from tests.support.plain import plain_generate, plain_score
from tests.support.tiny import build, llama_tokenizer, make_decoder, make_experts
from tests.support.toy import make_plan, prepare_toys, toy_config


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a toy run whose data are in the cache."""
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    config: RunConfig = toy_config(llama_folder, tmp_path / "run")
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return config


def write_bart(folder: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    build("bart", vocab_size=340, **sizes, **heads).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)


def write_quantized(folder: Path) -> None:
    make_decoder(folder, "llama")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("write", "said"),
    [(write_bart, "only T5's are supported"), (write_quantized, "the weights are quantized")],
)
def test_the_plan_refuses_a_base_that_actors_could_not_use(
    config: RunConfig, tmp_path: Path, write: Any, said: str
) -> None:
    write(tmp_path / "base")
    config.base = BaseConfig(str(tmp_path / "base"))
    with pytest.raises(PhatgooseError) as raised:
        make_plan(config)
    line = str(raised.value)
    assert said in line
    assert line.startswith(f"base={tmp_path / 'base'}: ")
    assert "\n" not in line


def test_the_plan_reports_weights_that_no_expert_adapts(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.base = BaseConfig(str(make_decoder(tmp_path / "base", "mixtral")))
    with caplog.at_level(logging.WARNING):
        make_plan(config)
    lines = [r.getMessage() for r in caplog.records if "no expert adapts" in r.getMessage()]
    assert len(lines) == 1
    assert "experts.gate_up_proj" in lines[0]


TEXTS = ["the", "Is the lake deep?", "Question: which bird flies in the flock?\nAnswer:"]


@pytest.mark.parametrize("router", ["base", "phatgoose"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"sliding_window": 5}),
        ("lfm2", {}),
        ("mpt", {}),
        ("gpt2", {}),
    ],
)
def test_an_actor_answers_like_single_sequences(
    tmp_path: Path, kind: str, changes: dict[str, Any], router: str
) -> None:
    base = load_base(str(make_decoder(tmp_path / "base", kind, **changes)))
    experts = make_experts(base, 3)
    choices = (" the goose and the swan", " no")
    model = RoutedModel(base, Pool.from_experts(experts), make_router(router))
    asked = [Request(text, choices[:1], 7) for text in TEXTS]
    answered = answer_shard(base, model, EncodedShard("t", "generate", [encode(base, asked, "")]))
    asked = [Request(text, choices) for text in TEXTS]
    scored = answer_shard(base, model, EncodedShard("t", "score", [encode(base, asked, "")]))
    for text, written, (first,), both in zip(
        TEXTS, answered.texts, answered.scores, scored.scores, strict=True
    ):
        tokens = plain_generate(base, encode_context(base, text), 7)
        assert written == base.tokenizer.decode(tokens, skip_special_tokens=True)
        expected = [plain_score(base, *encode_pair(base, text, choice)) for choice in choices]
        for actual, plain in zip((first, *both), (expected[0], *expected), strict=True):
            assert actual.loglikelihood == pytest.approx(plain.loglikelihood, abs=1e-4)
            assert actual.eos_loglikelihood == pytest.approx(plain.eos_loglikelihood, abs=1e-4)
            assert actual.is_greedy == plain.is_greedy
