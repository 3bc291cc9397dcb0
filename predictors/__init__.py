"""Arrays in, predictions with intervals out: latency, memory, quality. Knows nothing of supernets."""

from predictors.accuracy import QualityPrediction, QualityPredictor, QualityReport, cross_validated
from predictors.block_table import AdditiveTable
from predictors.features import latency_features
from predictors.intervals import conformal_quantile
from predictors.latency import LatencyPrediction, LatencyPredictor, describe_workloads, training_digest
from predictors.memory import MemoryPrediction, MemoryPredictor
from predictors.metrics import coverage, mape, spearman, within
from predictors.sampling import most_informative

__all__ = [
    "AdditiveTable",
    "LatencyPrediction",
    "LatencyPredictor",
    "MemoryPrediction",
    "MemoryPredictor",
    "QualityPrediction",
    "QualityPredictor",
    "QualityReport",
    "conformal_quantile",
    "coverage",
    "cross_validated",
    "describe_workloads",
    "latency_features",
    "mape",
    "most_informative",
    "spearman",
    "training_digest",
    "within",
]
