import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phatgoose.base import Base
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from tests.support.tiny import make_experts


def alter(expert: Expert, *, linears: dict[str, LoraFactors] | None = None, **card: Any) -> Expert:
    """Return an expert with another card or other factors."""
    return Expert(dataclasses.replace(expert.card, **card), linears or expert.linears)


def test_experts_are_stacked_in_order_with_their_scales_folded_in(base: Base) -> None:
    experts = make_experts(base, 3)
    assert len({expert.card.scale for expert in experts}) == 3
    pool = Pool.from_experts(experts)
    assert pool.experts == ("e0", "e1", "e2")
    assert list(pool.linears) == list(base.linears)
    for name, stacked in pool.linears.items():
        assert stacked.gate_ED is not None
        for index, expert in enumerate(experts):
            factors = expert.linears[name]
            assert torch.equal(stacked.lora_A_ERD[index], factors.lora_A_RD)
            assert torch.equal(stacked.lora_B_EOR[index], factors.lora_B_OR * expert.card.scale)
            assert factors.gate_D is not None
            assert torch.equal(stacked.gate_ED[index], factors.gate_D)


def test_padding_a_lower_rank_changes_nothing(llama: Base) -> None:
    experts = [make_experts(llama, 1, rank=2, seed=1)[0], *make_experts(llama, 2, rank=5)[1:]]
    pool = Pool.from_experts(experts)
    for name, stacked in pool.linears.items():
        assert stacked.lora_A_ERD.shape[1] == 5
        for index, expert in enumerate(experts):
            factors = expert.linears[name]
            torch.testing.assert_close(
                stacked.lora_B_EOR[index] @ stacked.lora_A_ERD[index],
                expert.card.scale * factors.lora_B_OR @ factors.lora_A_RD,
            )


@pytest.mark.parametrize("gates", [True, False])
def test_a_saved_pool_opens_unchanged(llama: Base, tmp_path: Path, gates: bool) -> None:
    pool = Pool.from_experts(make_experts(llama, 3, gates=gates))
    pool.save(tmp_path / "pool")
    opened = Pool.open(tmp_path / "pool")
    assert opened.experts == pool.experts
    assert opened.base_fingerprint == pool.base_fingerprint
    assert list(opened.linears) == list(pool.linears)
    for name, stacked in pool.linears.items():
        other = opened.linears[name]
        assert torch.equal(other.lora_A_ERD, stacked.lora_A_ERD)
        assert torch.equal(other.lora_B_EOR, stacked.lora_B_EOR)
        if gates:
            assert other.gate_ED is not None
            assert stacked.gate_ED is not None
            assert torch.equal(other.gate_ED, stacked.gate_ED)
        else:
            assert other.gate_ED is None


def test_a_pool_has_gates_only_if_all_experts_have_them(llama: Base) -> None:
    experts = [*make_experts(llama, 1), *make_experts(llama, 2, gates=False)[1:]]
    assert all(linear.gate_ED is None for linear in Pool.from_experts(experts).linears.values())


def test_an_expert_may_leave_out_linears(llama: Base, tmp_path: Path) -> None:
    first, second = make_experts(llama, 2)
    last = llama.linears[-1]
    part = alter(second, linears={n: f for n, f in second.linears.items() if n != last})
    pool = Pool.from_experts([part, first])
    assert set(pool.linears) == set(llama.linears)
    pool.save(tmp_path)
    for stacked in (pool, Pool.open(tmp_path)):
        linear = stacked.linears[last]
        assert linear.absent_E is not None
        assert linear.absent_E.tolist() == [True, False]
        assert linear.gate_ED is not None
        assert not linear.lora_B_EOR[0].any()
        assert torch.equal(linear.lora_A_ERD[1], first.linears[last].lora_A_RD)
        assert all(f.absent_E is None for name, f in stacked.linears.items() if name != last)


def test_experts_are_written_as_their_pool_is_saved(llama: Base, tmp_path: Path) -> None:
    """Check on experts of several ranks and dtypes, without some gates and linears."""
    first, second, third = make_experts(llama, 3)
    lower = make_experts(llama, 4, rank=2)[3]
    last = llama.linears[-1]
    part = alter(second, linears={n: f for n, f in second.linears.items() if n != last})
    wide = alter(
        third,
        linears={
            name: LoraFactors(f.lora_A_RD.double(), f.lora_B_OR.double(), None)
            if name == llama.linears[2]
            else f
            for name, f in third.linears.items()
        },
    )
    experts = [first, part, wide, lower]
    Pool.write(experts, tmp_path / "written")
    Pool.from_experts(experts).save(tmp_path / "saved")
    files = [tmp_path / folder / "pool.safetensors" for folder in ("written", "saved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(PhatgooseError, match="one name"):
        Pool.write([first, first], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit holds on Linux")
@pytest.mark.parametrize("call", ["Pool.write(experts, folder)", "Pool.from_experts(experts)"])
def test_one_linear_at_a_time_is_in_memory(llama: Base, tmp_path: Path, call: str) -> None:
    """Check with a limit that leaves room for one linear's stack and a half, of 25 MiB and 12."""
    for expert in make_experts(llama, 5):
        wide = LoraFactors(torch.ones(32, 20480), torch.ones(20480, 32))
        alter(expert, linears={f"linear.{i}": wide for i in range(8)}).save(
            tmp_path / expert.card.name
        )
    code = f"""
import resource, sys
from pathlib import Path
import torch
from phatgoose.expert import Expert
from phatgoose.pool import Pool
torch.set_num_threads(1)
torch.ones(100).sum()
paths, folder = sorted(Path(sys.argv[1]).glob("e*")), Path(sys.argv[1]) / "pool"
experts = [Expert.load(path) for path in paths]
status = Path("/proc/self/status").read_text()
(used,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
limit = used * 1024 + 37 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
{call}
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    if call.startswith("Pool.write"):
        assert done.returncode == 0, done.stderr
        assert Pool.open(tmp_path / "pool").experts == ("e0", "e1", "e2", "e3", "e4")
    else:  # the limit is one that is noticed
        assert "memory" in done.stderr


def other_shape(expert: Expert) -> Expert:
    name, factors = next(iter(expert.linears.items()))
    wider = LoraFactors(factors.lora_A_RD, torch.zeros(99, factors.lora_A_RD.shape[0]), None)
    return alter(expert, linears={**expert.linears, name: wider})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: alter(e, name="e0"), r"one name: \['e0', 'e0'\]"),
        (lambda e: alter(e, base_fingerprint="other"), "'e0' and 'e1' were made with different b"),
        (other_shape, r"'e0' and 'e1' differ in shape on .*q_proj"),
    ],
)
def test_incompatible_experts_are_refused(
    llama: Base, change: Callable[[Expert], Expert], message: str
) -> None:
    first, second = make_experts(llama, 2)
    with pytest.raises(PhatgooseError, match=message):
        Pool.from_experts([first, change(second)])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(PhatgooseError, match="at least one expert"):
        Pool.from_experts([])


def test_an_unknown_expert_is_named_with_the_available_ones(llama: Base) -> None:
    pool = Pool.from_experts(make_experts(llama, 2))
    assert pool.index("e1") == 1
    with pytest.raises(PhatgooseError, match=r"no expert 'e2': .*it has e0, e1"):
        pool.index("e2")


def test_a_missing_or_damaged_file_is_named(llama: Base, tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"pool\.safetensors"):
        Pool.open(tmp_path)
    Pool.from_experts(make_experts(llama, 2)).save(tmp_path)
    file = tmp_path / "pool.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PhatgooseError, match=r"pool\.safetensors"):
        Pool.open(tmp_path)
