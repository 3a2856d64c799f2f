"""Image-guided retrieval with optional text: composed image retrieval and sketch-based retrieval in one model.

The public names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from union_igrot.api import evaluate as evaluate, train as train
    from union_igrot.cli.config import compose as compose
    from union_igrot.datasets.folder import folder_benchmark as folder_benchmark, folder_training as folder_training
    from union_igrot.datasets.loading import load_benchmark as load_benchmark, load_training as load_training
    from union_igrot.datasets.registry import register_benchmark as register_benchmark
    from union_igrot.errors import UnionError as UnionError
    from union_igrot.evaluation.evaluate import evaluate_benchmark as evaluate_benchmark
    from union_igrot.evaluation.ranking import rank as rank
    from union_igrot.evaluation.results import EvaluationResult as EvaluationResult
    from union_igrot.features.extractor import Encoder as Encoder, FeatureExtractor as FeatureExtractor
    from union_igrot.features.store import FeatureStore as FeatureStore
    from union_igrot.gallery.engines.factory import register_engine as register_engine
    from union_igrot.gallery.gallery import Gallery as Gallery
    from union_igrot.images.transforms import image_batch as image_batch, picture_batch as picture_batch
    from union_igrot.metrics.functional import (
        average_precision as average_precision,
        precision_at_k as precision_at_k,
        recall_at_k as recall_at_k,
    )
    from union_igrot.metrics.names import register_metric as register_metric
    from union_igrot.models.backbones.base import Backbone as Backbone
    from union_igrot.models.heads.query import QueryHead as QueryHead
    from union_igrot.models.heads.target import TargetHead as TargetHead
    from union_igrot.models.model import IGROTModel as IGROTModel, load as load
    from union_igrot.models.reference import load_reference_checkpoint as load_reference_checkpoint
    from union_igrot.models.registry import (
        register_backbone as register_backbone,
        register_query_head as register_query_head,
        register_target_head as register_target_head,
    )
    from union_igrot.synthetic.shapes import (
        shapes_cir as shapes_cir,
        shapes_sbir as shapes_sbir,
        shapes_training as shapes_training,
    )
    from union_igrot.training.datamodule import IGROTDataModule as IGROTDataModule
    from union_igrot.training.learner import Learner as Learner
    from union_igrot.training.losses import InfoNCE as InfoNCE
    from union_igrot.training.settings import Recipe as Recipe
    from union_igrot.types import (
        Benchmark as Benchmark,
        Features as Features,
        GalleryItem as GalleryItem,
        Preprocess as Preprocess,
        Protocol as Protocol,
        Query as Query,
        TrainingSet as TrainingSet,
        Triplet as Triplet,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
