"""What each public benchmark should hold, and where it comes from.

Counts are those of the official files (queries, gallery images) by split and part; None
where no public count is known. Does not read files.
"""

from collections.abc import Mapping

Counts = Mapping[tuple[str, str], tuple[int | None, int | None]]

COUNTS: Mapping[str, Counts] = {
    "fashioniq": {
        ("val", "dress"): (2017, 3817),
        ("val", "shirt"): (2038, 6346),
        ("val", "toptee"): (1961, 5373),
    },
    "cirr": {("val", ""): (4181, 2297), ("test1", ""): (4148, 2315)},
    "circo": {("val", ""): (220, 123_403), ("test", ""): (800, 123_403)},
    "genecis": {
        ("val", "focus_attribute"): (2000, None),
        ("val", "change_attribute"): (2112, None),
        ("val", "focus_object"): (1960, None),
        ("val", "change_object"): (1960, None),
    },
    "lasco": {("val", ""): (30_037, 39_826)},
    "llavasco": {("train", ""): (None, None), ("val", ""): (None, None)},
    "dtin": {("val", domain): (10_000, 16_983) for domain in ("cartoon", "origami", "toy", "sculpture")},
    "sketchy": {("zeroshot1", ""): (15_229, 17_101), ("zeroshot0", ""): (12_694, 12_553)},
    "tuberlin": {("test", ""): (2_400, 27_989)},
    "quickdraw": {("test", ""): (92_291, 54_151)},
    "training_sketchy": {("train", ""): (5_000, None)},
}
"""Queries and gallery images by (split, part)."""

FETCHED_FROM: Mapping[str, str] = {
    "fashioniq": "annotations: GitHub, XiaoxiaoGuo/fashion-iq; images: its product links, many dead, or a mirror",
    "cirr": "annotations: GitHub, Cuberick-Orion/CIRR, branch cirr_dataset; images: NLVR2's request form",
    "circo": "annotations: GitHub, miccunifi/CIRCO; images: COCO 2017 unlabeled (19 GB), cocodataset.org",
    "genecis": "annotations: GitHub, facebookresearch/genecis; images: COCO val2017 and Visual Genome",
    "lasco": "annotations: GitHub, levymsn/LaSCo; images: COCO 2014 train and val, cocodataset.org",
    "llavasco": "annotations: the UNION authors' Google Drive; images: COCO 2014 train and val, cocodataset.org",
    "dtin": "lists: GitHub, google-research/composed_image_retrieval (Pic2Word); images: ImageNet val and ImageNet-R",
    "sketchy": "lists and images: the archive that ZSE-SBIR's README names",
    "tuberlin": "lists and images: the archive that ZSE-SBIR's README names",
    "quickdraw": "lists and images: the archive that ZSE-SBIR's README names",
    "training_sketchy": "triplets: the UNION authors' Google Drive, or data.build=5000; images: as for sketchy",
}
"""Where each is to be had."""
