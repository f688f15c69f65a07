import pytest

from phatgoose.errors import PhatgooseError
from phatgoose.routers import ROUTERS, make_router
from phatgoose.routers.merged import Merged
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.random import Random
from phatgoose.routers.single import Single


def test_routers_by_name() -> None:
    assert make_router("base") == NoExpert()
    assert make_router("merged") == Merged()
    assert make_router("phatgoose", top_k=3) == Phatgoose(top_k=3)
    assert make_router("random", seed=5) == Random(seed=5)
    assert make_router("single:a-b.c") == make_router("single", expert="a-b.c") == Single("a-b.c")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phatgose", "no router 'phatgose': did you mean 'phatgoose'"),
        ("marged", "did you mean 'merged'"),
        ("xyz", "no router 'xyz': there are base, merged, phatgoose, random, single"),
        ("merged:a", "no router 'merged:a'"),
        ("single", "expert"),
        ("single:", "expert"),
    ],
)
def test_wrong_names_get_the_near_ones(name: str, message: str) -> None:
    with pytest.raises(PhatgooseError, match=message):
        make_router(name)


@pytest.mark.parametrize(
    ("name", "option"), [("phatgoose", "topk"), ("base", "top_k"), ("random", "needs")]
)
def test_wrong_options_get_those_there_are(name: str, option: str) -> None:
    with pytest.raises(PhatgooseError, match=f"router {name} has no option '{option}'; it has"):
        make_router(name, **{option: 1})


@pytest.mark.parametrize("name", ["phatgoose", "random"])
@pytest.mark.parametrize("top_k", [0, -1])
def test_a_token_needs_an_expert(name: str, top_k: int) -> None:
    with pytest.raises(PhatgooseError, match=r"top_k"):
        make_router(name, top_k=top_k)


def test_only_routers_that_look_at_answers_are_not_zero_shot() -> None:
    assert all(router.zero_shot for router in ROUTERS.values())
