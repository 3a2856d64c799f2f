"""Benchmarks and training sets: public ones by name, registered ones, and folders of one's own images."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.datasets.annotations import DatasetFolder as DatasetFolder
    from union_igrot.datasets.folder import folder_benchmark as folder_benchmark, folder_training as folder_training
    from union_igrot.datasets.loading import load_benchmark as load_benchmark, load_training as load_training
    from union_igrot.datasets.registry import (
        BenchmarkDeclaration as BenchmarkDeclaration,
        BenchmarkOption as BenchmarkOption,
        benchmark_names as benchmark_names,
        register_benchmark as register_benchmark,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
