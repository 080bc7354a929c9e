"""Site names: parsed, printed, ordered as a forward pass meets them, and checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_wsae.errors import UsageError
from llm_wsae.model.site import POINTS, Site

sites = st.builds(Site, st.integers(0, 200), st.sampled_from(POINTS))


@given(sites)
def test_name_round_trip(site):
    assert Site.parse(str(site)) == site


def test_order_is_the_order_of_the_forward_pass():
    names = [f"blocks.{b}.hook_resid_{p}" for b in (0, 1, 10) for p in ("pre", "mid", "post")]
    parsed = [Site.parse(name) for name in names]
    assert sorted(reversed(parsed)) == parsed
    assert max(parsed) == Site(10, "post")


MISSPELT = [
    ("blocks.9.hook_resid_pots", "'blocks.9.hook_resid_post'"),
    ("block.12.hook_resid_mid", "'blocks.12.hook_resid_mid'"),
    ("blocks.9.resid_pre", "'blocks.9.hook_resid_pre'"),
    ("blocks.-1.hook_resid_post", "'blocks.1.hook_resid_post'"),
    ("nonsense", "'blocks.0.hook_resid_pre'"),
    ("", "'blocks.0.hook_resid_pre'"),
]


def test_misspelt_names_offer_the_nearest():
    for name, offered in MISSPELT:
        with pytest.raises(UsageError, match="is not a site") as caught:
            Site.parse(name)
        assert offered in str(caught.value)


def test_check_names_the_range():
    Site(11, "post").check(12)
    with pytest.raises(UsageError, match=r"12 blocks, blocks\.0\.hook_resid_pre to blocks\.11"):
        Site(12, "pre").check(12)
