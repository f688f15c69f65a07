"""Check that a notebook shows one line for an expert, a pool and a profile."""

from phatgoose.base import Base
from phatgoose.pool import Pool
from tests.support.pools import make_profiles
from tests.support.tiny import make_experts


def test_each_repr_is_one_line(llama: Base) -> None:
    experts = make_experts(llama, 2)
    pool = Pool.from_experts(experts).with_profiles(make_profiles(experts))
    assert pool.profiles is not None
    assert repr(experts[0]) == "Expert(e0: 14 linears, rank 4, gates)"
    assert repr(pool) == "Pool(e0, e1; 14 linears)"
    for shown in (repr(pool.profiles[0]), repr(pool)):
        assert len(shown) < 100
