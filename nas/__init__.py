"""Neural architecture search that fits a decoder to a device: its public names, each imported when first asked for.

`nas.search.search` goes by `run_search` here: a package cannot hold a function and a submodule of one name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.artefacts import export_subnet
    from nas.budget import Budget
    from nas.evaluate import Evaluator
    from nas.families import load_model
    from nas.queries import answer_query
    from nas.recovery import tune
    from nas.report import write_report
    from nas.search import SearchSettings
    from nas.search import search as run_search
    from nas.space import SearchSpace
    from nas.study import Study
    from nas.subnet import Subnet
    from nas.supernet import Supernet
    from nas.tuned import TuneSettings

__all__ = [
    "Budget",
    "Evaluator",
    "SearchSettings",
    "SearchSpace",
    "Study",
    "Subnet",
    "Supernet",
    "TuneSettings",
    "answer_query",
    "export_subnet",
    "load_model",
    "run_search",
    "tune",
    "write_report",
]

_ORIGINS = {
    "Budget": "nas.budget.Budget",
    "Evaluator": "nas.evaluate.Evaluator",
    "SearchSettings": "nas.search.SearchSettings",
    "SearchSpace": "nas.space.SearchSpace",
    "Study": "nas.study.Study",
    "Subnet": "nas.subnet.Subnet",
    "Supernet": "nas.supernet.Supernet",
    "TuneSettings": "nas.tuned.TuneSettings",
    "answer_query": "nas.queries.answer_query",
    "export_subnet": "nas.artefacts.export_subnet",
    "load_model": "nas.families.load_model",
    "run_search": "nas.search.search",
    "tune": "nas.recovery.tune",
    "write_report": "nas.report.write_report",
}


def __getattr__(name: str) -> Any:
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _ORIGINS[name].rpartition(".")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
