import predictors


def test_all_names_are_exactly_the_exports() -> None:
    modules = {
        "accuracy",
        "block_table",
        "boosting",
        "features",
        "intervals",
        "latency",
        "linear",
        "memory",
        "metrics",
        "sampling",
    }
    exported = {name for name in vars(predictors) if not name.startswith("_")} - modules
    assert exported == set(predictors.__all__)
