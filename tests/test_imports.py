"""What imports what: the package alone, the old names, the arrows between the parts."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(("old", "new"), [("hub", "publish"), ("doctor", "diagnose")])
def test_a_deprecated_module_warns_and_has_what_it_had(old: str, new: str) -> None:
    sys.modules.pop(f"hf_adalip.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"import from hf_adalip.{new}"):
        module = importlib.import_module(f"hf_adalip.{old}")
    found = importlib.import_module(f"hf_adalip.{new}")
    assert {name: getattr(found, name) for name in module.__all__} == {
        name: getattr(module, name) for name in module.__all__
    }
