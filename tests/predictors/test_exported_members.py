from pathlib import Path

import predictors


def test_all_names_are_exactly_the_exports() -> None:
    modules = {file.stem for file in Path(predictors.__file__).parent.glob("*.py")}
    exported = {name for name in vars(predictors) if not name.startswith("_")} - modules
    assert exported == set(predictors.__all__)
