import subprocess
import sys

import pytest

import hw_profiles
from hw_profiles import store


def test_every_public_name_is_there() -> None:
    assert set(hw_profiles.__all__) <= set(dir(hw_profiles))
    assert all(getattr(hw_profiles, name) is not None for name in hw_profiles.__all__)
    assert (hw_profiles.Store, hw_profiles.StoreError) == (store.Store, store.StoreError)
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        _ = hw_profiles.Manager


def test_the_database_is_imported_when_it_is_asked_for() -> None:
    loaded = "print('sqlalchemy' in sys.modules)"
    code = f"import sys, hw_profiles; {loaded}; hw_profiles.Store; {loaded}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
