import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import nas


def typed_imports() -> dict[str, str]:
    """{name: where it comes from} of the imports under TYPE_CHECKING, which type checkers believe."""
    tree = ast.parse(Path(nas.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_all_names_are_exactly_the_exports() -> None:
    assert sorted(typed_imports()) == sorted(nas.__all__)
    assert set(nas.__all__) <= set(dir(nas))


@pytest.mark.parametrize("name", nas.__all__)
def test_a_name_is_what_type_checkers_take_it_for(name: str) -> None:
    module, _, attribute = typed_imports()[name].rpartition(".")
    assert getattr(nas, name) is getattr(import_module(module), attribute)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        _ = nas.Manager


HEAVY = ("torch", "transformers", "openvino", "onnxruntime", "xgboost", "pymoo", "matplotlib", "scipy")


@pytest.mark.parametrize("module", ["nas", "nas.cli"])
def test_importing_stays_light(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
