"""What a mixture string says, and that the shares it asks for are the shares it gets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data.mixture import Part, parse_mixture, rates
from speechjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("folder:/a", [Part("folder:/a")]),
        ("  embedded  ", [Part("embedded")]),
        ("embedded + embedded:2", [Part("embedded"), Part("embedded:2")]),
        (
            "folder:/a?weight=2&hours=10 + shards:/b?copy=no",
            [Part("folder:/a", 2.0, 10.0), Part("shards:/b", copy=False)],
        ),
        ("tfds:x:train[:10%]#speech@16000?hours=.5", [Part("tfds:x:train[:10%]#speech@16000", hours=0.5)]),
        ("tfds:x:train+test?copy=yes", [Part("tfds:x:train+test")]),
        ("folder:/a\n  + manifest:b.jsonl", [Part("folder:/a"), Part("manifest:b.jsonl")]),
        # What only resembles the grammar is part of a name.
        ("folder:/who + what?really", [Part("folder:/who + what?really")]),
        ("folder:/a+b", [Part("folder:/a+b")]),
        ("folder:/a?=b", [Part("folder:/a?=b")]),
        ("folder:/a=b&hours=1", [Part("folder:/a=b&hours=1")]),
        ("folder:/odd?name=x?weight=1.5", [Part("folder:/odd?name=x", 1.5)]),
        ("folder:/a\nb?hours=1", [Part("folder:/a\nb", hours=1.0)]),
        # A forgotten kind is left to open_source, which knows the kinds.
        ("folder:/a + /b", [Part("folder:/a"), Part("/b")]),
        ("folder:/a + fodler:/b", [Part("folder:/a"), Part("fodler:/b")]),
    ],
)
def test_parse(text, parts):
    assert parse_mixture(text) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a part is empty; e.g. folder:/data/a"),
        ("folder:/a +", "a part is empty"),
        ("folder:/a + ", "a part is empty"),
        ("+ folder:/a", "a part is empty"),
        ("folder:/a + + folder:/b", "a part is empty"),
        ("?weight=2", "a part is empty"),
        (
            "folder:/a?wieght=2",
            r"'folder:/a\?wieght=2': unknown option 'wieght' \(did you mean weight\?\); e.g.",
        ),
        ("folder:/a?weight=2&colour=red", "unknown option 'colour'; e.g."),
        ("folder:/a?weight=1&weight=2", "weight is there twice"),
        ("folder:/a?weight=0", "weight=0 is not a positive number"),
        ("folder:/a?weight=-1", "weight=-1 is not a positive number"),
        ("folder:/a?hours=inf", "hours=inf is not a positive number"),
        ("folder:/a?hours=nan", "hours=nan is not a positive number"),
        ("folder:/a?hours=", "hours= is not a positive number"),
        ("folder:/a?copy=maybe", "copy=maybe is neither yes nor no"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_mixture(text)
    assert "\n" not in str(caught.value)


def shares(hours, weights, temperature) -> np.ndarray:
    """Of the hours heard in an epoch, each source's share."""
    heard = rates(hours, weights, temperature) * hours
    # The epoch is as long as the corpus; 1e-12: a few roundings of float64.
    np.testing.assert_allclose(heard.sum(), np.sum(hours), rtol=1e-12)
    return heard / heard.sum()


def test_proportional_hears_every_example_exactly_once():
    assert rates([0.1, 7.3, 960.9], [1, 1, 1], 1.0).tolist() == [1.0, 1.0, 1.0]
    assert rates([0.3], [5.0], 3.0).tolist() == pytest.approx([1.0], rel=1e-15)


def test_infinity_gives_equal_shares():
    np.testing.assert_allclose(shares([1.0, 10.0, 1000.0], [1, 1, 1], np.inf), [1 / 3] * 3, rtol=1e-12)
    np.testing.assert_allclose(shares([1.0, 10.0], [3, 1], np.inf), [0.75, 0.25], rtol=1e-12)


def test_temperature_two_is_the_square_root():
    """1 h and 100 h: 1/11 and 10/11 of 101 h, so the small one 101/11 times."""
    np.testing.assert_allclose(shares([1.0, 100.0], [1, 1], 2.0), [1 / 11, 10 / 11], rtol=1e-12)
    np.testing.assert_allclose(rates([1.0, 100.0], [1, 1], 2.0), [101 / 11, 10.1 / 11], rtol=1e-12)


def test_exponents_of_xlm_r():
    """p ~ n^0.3 is the published form, with alpha the reciprocal of the temperature."""
    hours = np.array([3.0, 20.0, 400.0])
    np.testing.assert_allclose(shares(hours, [1, 1, 1], 1 / 0.3), hours**0.3 / (hours**0.3).sum(), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.floats(1e-3, 1e5), st.floats(0.01, 100)), min_size=2, max_size=6),
    temperature=st.floats(1, 50),
)
def test_shares_follow_the_formula(parts, temperature):
    hours, weights = map(np.array, zip(*parts, strict=True))
    wanted = weights * np.exp(np.log(hours) / temperature)  # another way to the power; hence 1e-9
    np.testing.assert_allclose(shares(hours, weights, temperature), wanted / wanted.sum(), rtol=1e-9)
    np.testing.assert_allclose(rates(hours, 7 * weights, temperature), rates(hours, weights, temperature), rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.5, float("nan")])
def test_temperatures_that_make_no_sense(temperature):
    with pytest.raises(UserError, match=f"temperature={temperature:g} of the mixture must be at least 1"):
        rates([1.0, 2.0], [1, 1], temperature)


@pytest.mark.parametrize(("hours", "weights"), [([], []), ([1.0], [1, 1]), ([0.0, 1.0], [1, 1]), ([1.0], [-1])])
def test_a_callers_mistake(hours, weights):
    with pytest.raises(ValueError, match="must be as many, and positive"):
        rates(hours, weights, 1.0)
