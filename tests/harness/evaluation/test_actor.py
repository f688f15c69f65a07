"""Check that a machine without a GPU can read the answers of an evaluation actor."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.evaluation.actor import Asked, EvalActor, Receipt
from harness.evaluation.answer_files import AnswerFiles
from harness.evaluation.answers import Answer
from harness.evaluation.encoding import EncodedShard, encode
from harness.evaluation.shards import Kind, Request
from harness.registry import Registry
from harness.storage import Folder
from phatgoose.base import Base
from phatgoose.expert import Expert
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.routers import make_router
from tests.support.registries import BASE, make_expert
from tests.support.tiny import make_experts
from tests.support.toy import local_actor, members_of

GPU = torch.device("cuda", 0)

SHARDS: list[tuple[Kind, Request]] = [
    ("score", Request("Is the lake deep?", (" yes", " no"))),
    ("generate", Request("two and two is", (" four",), 3)),
    ("generate", Request("two and two is ", (" four",), 3)),  # read twice
]


class OnGpu(Tensor):
    """A fake GPU tensor: results of operations are fake too, and unpickling it fails."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)

    def to(self, *args: Any, **options: Any) -> Any:
        moved = super().to(*args, **options)
        return moved.cpu() if "cpu" in map(str, [*args, *options.values()]) else moved

    def __reduce_ex__(self, _: Any) -> Any:
        raise RuntimeError("Attempting to deserialize object on a CUDA device")


class LogOnGpu(RoutingLog):
    """A log of a model whose routing weights are on the fake GPU."""

    def add(
        self, linear: str, weights_TK: Tensor, indices_TK: Tensor, mask_T: Tensor, experts: int
    ) -> None:
        super().add(linear, weights_TK.as_subclass(OnGpu), indices_TK, mask_T, experts)


def test_the_fake_gpu_behaves_like_a_gpu() -> None:
    log = LogOnGpu()
    log.add("q", torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long), torch.ones(2), 3)
    assert log.weights["q"].device == GPU
    with pytest.raises(RuntimeError, match="CUDA device"):
        pickle.dumps(log.weights)
    for moved in (log.weights["q"].cpu(), log.weights["q"].to("cpu")):
        assert moved.device.type == "cpu"
        assert moved.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "request_"), SHARDS)
@pytest.mark.parametrize("router", ["phatgoose", "uniform"])
def test_an_answer_contains_only_cpu_tensors(
    base: Base,
    router: str,
    kind: Kind,
    request_: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = make_experts(base, 3)
    actor: EvalActor = local_actor(base, experts)
    actor._files = files = AnswerFiles(Folder(tmp_path))
    asked = Asked(make_router(router), members_of(experts))
    shard = EncodedShard("task", kind, [encode(base, [request_], "")])
    receipt = actor.answer(asked, shard, "1")
    expected = files.read("1")
    assert receipt == Receipt(expected.tokens, expected.seconds)
    assert expected.routing.keys() == expected.routed.keys() == set(base.linears)
    stored: list[Answer] = []
    monkeypatch.setattr("harness.evaluation.answering.RoutingLog", LogOnGpu)
    monkeypatch.setattr(files, "write", lambda *given: stored.append(given[-1]))
    actor.answer(asked, shard, "2")
    (answer,) = pickle.loads(pickle.dumps(stored))
    assert answer.routing.keys() == expected.routing.keys()
    for linear, weights_E in answer.routing.items():
        assert type(weights_E) is Tensor
        assert weights_E.device.type == "cpu"
        assert torch.equal(weights_E, expected.routing[linear])
    assert answer.scores == expected.scores
    assert answer.texts == expected.texts


def test_an_expert_comes_from_the_registry_s_files_or_else_from_its_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert, asked = make_expert(0, value=1.0), list[str]()
    content = expert.content_hash()
    Registry(tmp_path / "here", BASE).publish(expert)

    def load(content_hash: str) -> Expert:
        asked.append(content_hash)
        return expert

    actor = object.__new__(EvalActor)
    monkeypatch.setattr(
        actor, "_registry_actor", SimpleNamespace(load=SimpleNamespace(remote=load)), raising=False
    )
    monkeypatch.setattr(actor, "_beat", lambda: None)
    monkeypatch.setattr("harness.evaluation.actor.ray.get", lambda value: value)
    for folder, calls in (("here", []), ("elsewhere", [content])):
        monkeypatch.setattr(actor, "_registry", Registry(tmp_path / folder, BASE), raising=False)
        assert actor._fetch(content).content_hash() == content
        assert asked == calls
