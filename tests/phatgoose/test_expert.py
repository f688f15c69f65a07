import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.card import Card, LoraFactors, validate_name
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert

CARD = Card(
    name="task-a",
    task="a",
    base="tiny",
    base_fingerprint="ba5e" * 16,
    data_fingerprint="da7a" * 16,
    job="0123456789abcdef",
    scale=1 / 16,
    recipe={"rank": 2, "steps": [10, 5]},
    metrics={"loss": 0.1},
)


def make_linears(dtype: torch.dtype = torch.float32) -> dict[str, LoraFactors]:
    """Return three linears of different shapes, the middle one without a gate."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "layers.10.up": LoraFactors(random(2, 5), random(3, 2), random(5)),
        "layers.2.up": LoraFactors(random(2, 5), random(3, 2), None),
        "layers.2.q": LoraFactors(random(4, 7), random(6, 4), random(7)),
    }


def with_card(**changes: Any) -> Expert:
    return Expert(dataclasses.replace(CARD, **changes), make_linears())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    expert = Expert(CARD, make_linears(dtype))
    expert.save(tmp_path / "expert.arrow")
    loaded = Expert.load(tmp_path / "expert.arrow")

    assert loaded.card == expert.card
    assert loaded.content_hash() == expert.content_hash()
    assert sorted(loaded.linears) == sorted(expert.linears)
    assert loaded.linears["layers.2.up"].gate_D is None
    for linear, factors in expert.linears.items():
        read = dict(loaded.linears[linear].tensors())
        for field, tensor in factors.tensors():
            assert read[field].dtype == dtype
            assert torch.equal(read[field], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["expert.arrow"]


def test_negative_zero_and_subnormal_bits_survive() -> None:
    values = torch.tensor([[0.0, -0.0, 1e-40]])
    expert = Expert(CARD, {"q": LoraFactors(values, torch.ones(1, 1))})
    read = Expert.from_buffer(expert.to_bytes(), "memory").linears["q"].lora_A_RD
    assert torch.equal(read.view(torch.int32), values.view(torch.int32))


def test_hash_ignores_insertion_order_and_memory_layout() -> None:
    linears = make_linears()
    expert = Expert(CARD, linears)
    backwards = Expert(CARD, dict(reversed(linears.items())))
    column_major = {
        linear: dataclasses.replace(f, lora_A_RD=f.lora_A_RD.T.contiguous().T)
        for linear, f in linears.items()
    }
    assert backwards.content_hash() == expert.content_hash()
    assert backwards.to_bytes() == expert.to_bytes()
    assert Expert(CARD, column_major).content_hash() == expert.content_hash()


@given(
    linear=st.sampled_from(sorted(make_linears())),
    field=st.sampled_from(["lora_A_RD", "lora_B_OR", "gate_D"]),
    position=st.integers(0, 1000),
    bit=st.sampled_from([0, 7, 15, 22, 31]),
)
def test_hash_depends_on_every_bit(linear: str, field: str, position: int, bit: int) -> None:
    linears = make_linears()
    before = Expert(CARD, linears).content_hash()
    tensor = getattr(linears[linear], field)
    if tensor is None:
        linears[linear] = dataclasses.replace(linears[linear], gate_D=torch.zeros(5))
    else:
        bits = tensor.view(torch.int32).view(-1)
        bits[position % len(bits)] ^= -(2**31) if bit == 31 else 1 << bit
    assert Expert(CARD, linears).content_hash() != before


def test_hash_depends_on_dtype_shape_and_linear_name() -> None:
    A, B = torch.zeros(2, 4), torch.zeros(4, 2)
    hashes = [
        Expert(CARD, linears).content_hash()
        for linears in (
            {"q": LoraFactors(A, B)},
            {"k": LoraFactors(A, B)},
            {"q": LoraFactors(A, B.double())},
            {"q": LoraFactors(A.view(4, 2), B.view(2, 4))},
            {"q": LoraFactors(A.half(), B)},
            {"q": LoraFactors(A.bfloat16(), B)},
        )
    ]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Card)])
def test_hash_depends_on_every_card_field(field: str) -> None:
    value = getattr(CARD, field)
    changed = {**value, "more": 2.0} if isinstance(value, dict) else value * 2
    assert with_card(**{field: changed}).content_hash() != with_card().content_hash()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(recipe=st.dictionaries(st.text(max_size=3) | st.integers(0, 20), json_values, max_size=4))
def test_any_recipe_is_restored_with_the_same_hash(recipe: dict[Any, Any]) -> None:
    expert = with_card(recipe=recipe)
    read = Expert.from_buffer(expert.to_bytes(), "memory")
    assert read.card == expert.card
    assert read.content_hash() == expert.content_hash()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_load_maps_the_file_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "expert.arrow"
    with_card().save(path)
    loaded = Expert.load(path)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for factors in loaded.linears.values():
        for _, tensor in factors.tensors():
            assert any(start <= tensor.data_ptr() < end for start, end in spans)


def test_replacing_a_file_does_not_change_loaded_tensors(tmp_path: Path) -> None:
    path = tmp_path / "expert.arrow"
    with_card().save(path)
    loaded = Expert.load(path)
    Expert(CARD, {"q": LoraFactors(torch.ones(1, 1), torch.ones(1, 1))}).save(path)
    assert loaded.content_hash() == with_card().content_hash()


def test_misaligned_values_are_read_correctly() -> None:
    one, wide = torch.ones(1, 1), torch.arange(3.0).view(1, 3)
    linears = {"a": LoraFactors(one.bfloat16(), one), "b": LoraFactors(wide, one, wide[0])}
    read = Expert.from_buffer(Expert(CARD, linears).to_bytes(), "memory")
    assert torch.equal(read.linears["b"].lora_A_RD, wide)
    assert read.linears["b"].lora_A_RD.data_ptr() % 4 == 0


@pytest.mark.filterwarnings("error")
def test_loading_does_not_warn(tmp_path: Path) -> None:
    with_card().save(tmp_path / "expert.arrow")
    Expert.load(tmp_path / "expert.arrow")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "expert.arrow"
    data = with_card().to_bytes()
    for length in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PhatgooseError, match=r"expert\.arrow") as raised:
            Expert.load(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"no arrow file", b'{"json": true}' * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.arrow"
    path.write_bytes(content)
    with pytest.raises(PhatgooseError, match=r"other\.arrow is not a whole expert file"):
        Expert.load(path)


def test_other_arrow_files_are_refused() -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"linear": ["q"]})
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(PhatgooseError, match="not a whole expert file"):
        Expert.from_buffer(sink.getvalue(), "other")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"nowhere\.arrow"):
        Expert.load(tmp_path / "nowhere.arrow")
    with pytest.raises(PhatgooseError, match=r"cannot save expert 'task-a'.*nowhere"):
        with_card().save(tmp_path / "nowhere" / "expert.arrow")


def test_a_newer_schema_asks_for_an_update() -> None:
    reader = pa.ipc.open_file(with_card().to_bytes())
    metadata = {**reader.schema.metadata, b"phatgoose.version": b"2"}
    batch = reader.get_batch(0).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(PhatgooseError, match="x has the newer schema 2: update phatgoose"):
        Expert.from_buffer(sink.getvalue(), "x")


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_or_changes_the_hash_or_is_harmless(
    position: int, bit: int
) -> None:
    expert = with_card()
    data = bytearray(expert.to_bytes())
    data[position % len(data)] ^= 1 << bit
    try:
        read = Expert.from_buffer(bytes(data), "memory")
    except PhatgooseError:
        return
    if read.content_hash() == expert.content_hash():  # a padding bit
        assert read.to_bytes() == expert.to_bytes()


BAD_SHAPES = [
    (torch.ones(2, 5), torch.ones(3, 3), None),
    (torch.ones(2, 5), torch.ones(3, 2), torch.ones(4)),
    (torch.ones(2, 5), torch.ones(3, 2), torch.ones(1, 5)),
    (torch.ones(5), torch.ones(3, 2), None),
    (torch.ones(0, 5), torch.ones(3, 0), None),
]


@pytest.mark.parametrize("factors", BAD_SHAPES)
def test_shapes_must_match(factors: tuple[Any, Any, Any]) -> None:
    with pytest.raises(PhatgooseError, match=r"linear 'layers\.0\.q': the shapes lora_A_RD"):
        Expert(CARD, {"layers.0.q": LoraFactors(*factors)})


@pytest.mark.parametrize("field", ["lora_A_RD", "lora_B_OR", "gate_D"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(field: str, value: float) -> None:
    factors = make_linears()["layers.2.q"]
    getattr(factors, field).view(-1)[-1] = value
    with pytest.raises(PhatgooseError, match=rf"linear 'layers\.2\.q': {field} holds NaN"):
        Expert(CARD, {"layers.2.q": factors})


def test_integers_are_refused() -> None:
    with pytest.raises(PhatgooseError, match="lora_A_RD is int64"):
        Expert(CARD, {"q": LoraFactors(torch.ones(1, 1).long(), torch.ones(1, 1))})


def test_an_expert_must_adapt_a_linear() -> None:
    with pytest.raises(PhatgooseError, match="adapts no linear"):
        Expert(CARD, {})


@pytest.mark.parametrize("name", ["a", "0", "A.b-c_d", "x" * 100])
def test_valid_names_are_accepted(name: str) -> None:
    assert validate_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a\n", "a b", "ä", "x" * 101])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(PhatgooseError, match="cannot name an expert"):
        validate_name(name)
    with pytest.raises(PhatgooseError, match="cannot name an expert"):
        with_card(name=name)


@pytest.mark.parametrize(
    "changes", [{"metrics": {"loss": float("nan")}}, {"recipe": {"a": {1, 2}}}, {"scale": 1e999}]
)
def test_cards_must_be_json(changes: dict[str, Any]) -> None:
    with pytest.raises(PhatgooseError, match=f"its {next(iter(changes))} is not JSON"):
        with_card(**changes)


def test_the_card_can_be_read_without_this_library(tmp_path: Path) -> None:
    with_card().save(tmp_path / "expert.arrow")
    metadata = pa.ipc.open_file(tmp_path / "expert.arrow").schema.metadata
    assert json.loads(metadata[b"phatgoose.card"]) == dataclasses.asdict(CARD)
