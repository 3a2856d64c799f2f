"""Exact search, scoring under a benchmark's protocol, and evaluation results."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.evaluation.evaluate import (
        average_parts as average_parts,
        evaluate_benchmark as evaluate_benchmark,
        means as means,
    )
    from union_igrot.evaluation.ranking import exact_topk as exact_topk, rank as rank, rank_chunks as rank_chunks
    from union_igrot.evaluation.results import (
        BenchmarkResult as BenchmarkResult,
        EvaluationResult as EvaluationResult,
        MethodResult as MethodResult,
        ScoredBenchmark as ScoredBenchmark,
        read_query_values as read_query_values,
        write_query_values as write_query_values,
        write_results as write_results,
    )
    from union_igrot.evaluation.scoring import score as score, score_predictions as score_predictions

__getattr__, __dir__ = lazy_exports(__name__, __file__)
