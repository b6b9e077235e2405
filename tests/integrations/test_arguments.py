"""Optimizer arguments as text."""

from __future__ import annotations

import pytest

from hf_adalip.integrations.arguments import parse_arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("gamma=0.9", {"gamma": 0.9}),
        ("gamma=0.9, c=theoretical", {"gamma": 0.9, "c": "theoretical"}),
        ("c=1e-8,layers=module", {"c": 1e-8, "layers": "module"}),
        ("scale_bounds=none,nesterov=True", {"scale_bounds": None, "nesterov": True}),
        ("scale_bounds=0.1:10", {"scale_bounds": (0.1, 10)}),
        ("beta1=0.9,beta2=0.99,eps=1e-6", {"betas": (0.9, 0.99), "eps": 1e-6}),
    ],
)
def test_values(text, expected):
    assert parse_arguments(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma", "got 'gamma'"),
        ("betas=0.9,0.99", "got '0.99'"),
        ("gamma=", "got 'gamma='"),
        ("gamma=1,gamma=2", "'gamma' is given twice"),
        ("beta1=0.9", "beta1 and beta2 go together"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(text)
