"""The generated world: scenes, images and benchmarks."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.synthetic.scenes import Edit as Edit, Scene as Scene, Thing as Thing
    from union_igrot.synthetic.shapes import (
        ShapesImage as ShapesImage,
        shapes_cir as shapes_cir,
        shapes_sbir as shapes_sbir,
        shapes_training as shapes_training,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
