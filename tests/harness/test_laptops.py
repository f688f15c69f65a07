"""Check systems without Linux-only functions, and a fake for the GPU of a Mac."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.scheduling import hardware
from harness.scheduling.cluster import Cluster
from harness.scheduling.settings import ClusterConfig
from phatgoose import files
from phatgoose.devices import off_mps
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.ops import mix, svd
from phatgoose.ops.mixing import _way, mix_reference

ROOT = Path(__file__).parents[2]
MPS = torch.device("mps")


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("/proc")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "readlink", refuse)


def test_cores_are_counted_without_cpu_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert hardware.usable_cores() == 11


@pytest.mark.slow
def test_a_local_cluster_starts_without_cpu_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    with Cluster() as cluster:
        cluster.connect()
        assert ray.cluster_resources()["CPU"] == os.cpu_count()


def test_a_machine_without_proc_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert hardware.memory_gib() == pytest.approx(memory, abs=1)
    assert hardware.processor()
    without_proc(monkeypatch)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert hardware.processor() == platform.machine()
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert hardware.processor() == "arm"
    assert re.fullmatch("[0-9a-f]{16}", files._machine())


def test_no_other_linux_only_function_is_used() -> None:
    """Check names that are missing on a Mac; three modules have a fallback."""
    names = r"sched_getaffinity|/proc/|/dev/shm|import (fcntl|resource|pwd|grp)|prctl|pidfd"
    names += r"|memfd|sendfile|posix_fadvise|SC_PHYS_PAGES|signal\.(SIGPWR|SIGSTKFLT|sigtimedwait)"
    sources = [f for package in ("harness", "phatgoose") for f in (ROOT / package).rglob("*.py")]
    found = {f.relative_to(ROOT).as_posix() for f in sources if re.search(names, f.read_text())}
    fallbacks = ("harness/scheduling/hardware.py", "phatgoose/files.py")
    assert found == {*fallbacks, "phatgoose/ops/frozen_linear.py"}


@pytest.mark.parametrize(
    ("cuda", "mps", "gpus", "device"),
    [
        (True, True, None, "cuda"),
        (False, True, None, "mps"),
        (False, False, None, "cpu"),
        (False, True, 0, "cpu"),
        (False, True, 1, "cuda"),
    ],
)
def test_the_device_of_a_run_is_chosen(
    cuda: bool, mps: bool, gpus: float | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("harness.scheduling.cluster.started_address", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert Cluster().device(ClusterConfig(gpus_per_actor=gpus)) == device


class OnMps(Tensor):
    """A fake tensor on a Mac's GPU, which refuses float64 and decompositions."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.linalg.qr, torch.linalg.svd):
            raise NotImplementedError("not currently implemented for the MPS device")
        return super().__torch_function__(func, types, args, kwargs or {})


def on_mps(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnMps)


def test_operations_missing_on_mps_are_computed_on_the_host() -> None:
    weights_TK, indices_TK = torch.rand(5, 2), torch.randint(3, (5, 2))
    mask_T = torch.tensor([True, True, False, True, True])
    with pytest.raises(TypeError, match="float64"):
        on_mps(weights_TK).double()
    there, here = RoutingLog(), RoutingLog()
    for _ in range(2):
        here.add("q", weights_TK, indices_TK, mask_T, 3)
        there.add("q", on_mps(weights_TK), on_mps(indices_TK), on_mps(mask_T), 3)
    assert type(there.weights["q"]) is Tensor
    assert torch.equal(there.weights["q"], here.weights["q"])
    assert there.tokens == here.tokens


def test_decompositions_of_mps_tensors_are_computed_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A_ERD, B_EOR = torch.randn(3, 2, 8), torch.randn(3, 6, 2)
    expected = [*svd.thin_svd(A_ERD, B_EOR), svd.output_projection(A_ERD, B_EOR)]
    moves: list[torch.device] = []
    to = Tensor.to

    def note(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if args and args[0] == MPS:  # there is no MPS device here
            moves.append(args[0])
            return tensor
        return to(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "to", note)
    case = on_mps(A_ERD), on_mps(B_EOR)
    found = [*svd.thin_svd(*case), svd.output_projection(*case)]
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor, wanted)
    assert moves == [MPS] * 3  # the results return to the device


def test_the_grouped_kernel_is_not_used_on_mps() -> None:
    experts, top_k = 64, 2
    A_ERD, B_EOR = torch.randn(experts, 4, 16), torch.randn(experts, 16, 4)
    indices_TK = torch.randint(experts, (32, top_k))
    assert _way(A_ERD, B_EOR, indices_TK) == "grouped"
    assert _way(on_mps(A_ERD), on_mps(B_EOR), indices_TK) == "loop"
    x_TD, weights_TK = torch.randn(32, 16), torch.rand(32, top_k)
    y_TO = mix(x_TD, on_mps(A_ERD), on_mps(B_EOR), indices_TK, weights_TK)
    expected_TO = mix_reference(x_TD, A_ERD, B_EOR, indices_TK, weights_TK)
    torch.testing.assert_close(y_TO.as_subclass(Tensor), expected_TO, rtol=1e-4, atol=1e-4)


def test_other_devices_are_unchanged() -> None:
    tensor = torch.rand(2)
    assert off_mps(tensor, tensor)[1] is tensor
