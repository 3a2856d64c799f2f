"""Small datasets in the benchmarks' official formats, generated for the tests.

Each function of `WRITERS` writes one dataset under a folder, with images on request, and returns the options with
which `load_benchmark` reads it.
"""

import json
import random
from pathlib import Path

from PIL import Image

CATEGORIES = ("dress", "shirt", "toptee")
TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
DOMAINS = ("cartoon", "origami", "toy", "sculpture")
CLASSES = ("cat", "hot air balloon", "bell")
SIZE = (40, 30)


def write_json(root, path, value):
    file = Path(root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_lines(root, path, lines):
    file = Path(root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_images(root, paths):
    """Write tiny images of one color and a bar each, which follow from the path."""
    for path in paths:
        file = Path(root) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        draw = random.Random(str(path))
        image = Image.new("RGB", SIZE, tuple(draw.randrange(256) for _ in range(3)))
        image.paste(tuple(draw.randrange(256) for _ in range(3)), (draw.randrange(20), 5, 35, 25))
        image.save(file)


def fashioniq(root, with_images=True, splits=("val",), suffixes=(".png", ".jpg")):
    for category in CATEGORIES:
        for split in splits:
            names = [f"B{category[0].upper()}{split[0]}{number:03d}" for number in range(8)]
            rows = [
                {"target": names[at + 1], "candidate": names[at], "captions": [f"Is blue {at}.", f"more of {at}?"]}
                for at in range(5)
            ]
            if split == "test":
                rows = [{key: row[key] for key in ("candidate", "captions")} for row in rows]
            write_json(root, f"captions/cap.{category}.{split}.json", rows)
            write_json(root, f"image_splits/split.{category}.{split}.json", names)
            if with_images:
                write_images(root, [f"images/{name}{suffixes[at % 2]}" for at, name in enumerate(names)])
    return [{"category": category} for category in CATEGORIES]


def cirr(root, with_images=True, splits=("val", "test1"), size=12):
    for split in splits:
        folder = {"val": "dev", "test1": "test1", "train": "train/34"}[split]
        names = [f"{split}-{at}-0-img0" for at in range(size)]
        rows = []
        for at in range(size - 6):
            members = names[at : at + 6]
            row = {"pairid": 100 + at, "reference": names[at], "caption": f"Show {at} Bottles"}
            row["img_set"] = {"id": at, "members": members, "reference_rank": 0}
            if split != "test1":
                row |= {"target_hard": names[at + 2], "target_soft": {names[at + 2]: 1.0}}
                row["img_set"]["target_rank"] = 2
            rows.append(row)
        write_json(root, f"cirr/captions/cap.rc2.{split}.json", rows)
        paths = {name: f"./{folder}/{name}.png" for name in names}
        write_json(root, f"cirr/image_splits/split.rc2.{split}.json", paths)
        if with_images:
            write_images(root, paths.values())
    return [{"split": split} for split in splits]


def circo(root, with_images=True, splits=("val", "test"), size=12):
    numbers = [1000 + 7 * at for at in range(size)]
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in numbers]
    write_json(root, "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"images": images})
    for split in splits:
        rows = []
        for at in range(5):
            row = {
                "reference_img_id": numbers[at],
                "relative_caption": f"Has {at}",
                "shared_concept": "A Dog",
                "id": at,
            }
            if split == "val":
                truths = numbers[at + 1 : at + 4]
                row |= {"target_img_id": truths[0], "gt_img_ids": truths, "semantic_aspects": ["addition", "negation"]}
            rows.append(row)
        write_json(root, f"annotations/{split}.json", rows)
    if with_images:
        write_images(root, [f"COCO2017_unlabeled/unlabeled2017/{image['file_name']}" for image in images])
    return [{"split": split} for split in splits]


def genecis(root, with_images=True):
    for task in TASKS:
        whole = task.endswith("object")
        count = 10 if task == "focus_attribute" else 15

        def item(number, whole=whole):
            if whole:
                return {"val_image_id": number}
            return {"image_id": number, "instance_bbox": [number % 20, 4, 12.5, 9]}

        rows = [
            {
                "reference": item(at),
                "target": item(at + 1),
                "gallery": [item(at + 2 + place) for place in range(count - 1)],
                "condition": f"color {at}",
            }
            for at in range(4)
        ]
        write_json(root, f"genecis/{task}.json", rows)
        if with_images:
            names = [f"val2017/{at:012d}.jpg" if whole else f"VG_100K/{at}.jpg" for at in range(4 + count)]
            write_images(root, names)
    return [{"task": task} for task in TASKS]


def lasco(root, with_images=True, splits=("val",)):
    names = {number: f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(40, 50)}
    for split in splits:
        rows = [
            {
                "qid": number * 1000,
                "query-image": [number, names[number]],
                "query-text": f"The person is riding {number}",
                "target-image": [number + 1, names[number + 1]],
            }
            for number in range(40, 47)
        ]
        write_json(root, f"lasco_{split}.json", rows)
    corpus = [{"id": number, "path": f"val/{name}"} for number, name in names.items()]
    write_json(root, "lasco_val_corpus.json", corpus)
    if with_images:
        write_images(root, names.values())
    return [{"split": split} for split in splits]


def llavasco(root, with_images=True, size=9):
    for split in ("train", "val"):
        rows = [
            {
                "reference_image_id": 10 + at,
                "relative_caption": f"add {at}",
                "target_image_id": 11 + at,
                "llava_reference_caption": f"SECRET reference {at}",
                "llava_target_caption": f"SECRET target {at}",
            }
            for at in range(size)
        ]
        write_json(root, f"{split}_llavasco.json", rows)
        if with_images:
            folder = f"{split}2014"
            write_images(root, [f"{folder}/COCO_{folder}_{10 + at:012d}.jpg" for at in range(size + 1)])
    return [{"split": "train"}, {"split": "val"}]


def dtin(root, with_images=True, prefix="imgnet/"):
    queries, targets, paths = [], [], []
    for label in range(4):
        for number in range(2):
            path = f"imgnet/real/n{label}/ILSVRC2012_val_{number}.JPEG"
            paths.append(path)
            queries.append(f"{path} {label} ")
    for domain, name in enumerate(DOMAINS):
        for label in range(domain + 1):  # sculpture has all four classes, cartoon has one
            path = f"imgnet/imagenet-r/n{label}/{name}_{label}.jpg"
            paths.append(path)
            targets.append(f"{path} {label + 1000 * domain} ")
    targets += [f"{path} {6000 + int(label)} " for path, label in (line.split() for line in queries)]
    write_lines(root, "imgnet/imgnet_real_query.txt", queries)
    write_lines(root, "imgnet/imgnet_targets.txt", targets)
    if with_images:
        write_images(root, [prefix + path.removeprefix("imgnet/") for path in paths])
    return [{"domain": domain} for domain in DOMAINS]


def _sbir(root, folder, lists, places, with_images, kinds=("zero", "train")):
    for kind in kinds:
        suffix = "_zero" if kind == "zero" else ""
        write_lines(root, f"{folder}/cname_cid{suffix}.txt", [f"{name} {at}" for at, name in enumerate(CLASSES)])
        for listing, place, count in zip(lists, places, (3, 4), strict=True):
            paths = [
                (place.format(kind=kind, name=name, number=number), label)
                for label, name in enumerate(CLASSES)
                for number in range(count)
            ]
            write_lines(root, f"{folder}/{listing.format(kind)}", [f"{path} {label} " for path, label in paths])
            if with_images:
                write_images(root, [path for path, _ in paths])


def sketchy(root, with_images=True):
    lists = ("sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt")
    places = (
        "256x256/sketch/tx_000000000000_ready/{name}/{kind} {number}-1.png",
        "EXTEND_image_sketchy_ready/{name}/ext_{kind}_{number}.jpg",
    )
    for folder in ("zeroshot0", "zeroshot1"):
        _sbir(root, folder, lists, places, with_images)
    return [{"split": "zeroshot1"}, {"split": "zeroshot0"}]


def tuberlin(root, with_images=True):
    lists = ("png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt")
    places = ("png_ready/{name}/{kind}{number}.png", "ImageResized_ready/{name}/{kind}_{number}.JPEG")
    _sbir(root, "zeroshot", lists, places, with_images)
    return [{}]


def quickdraw(root, with_images=True):
    lists = ("sketch_{}.txt", "all_photo_{}.txt")
    places = ("sketches/{name}/{kind}{number}.png", "images/{name}/{number}. {kind}-51311.jpeg")
    _sbir(root, "zeroshot", lists, places, with_images)
    return [{}]


def training_sketchy(root, with_images=True):
    sketchy(root, with_images)
    lines = []
    for at in range(6):
        sketch = f"256x256/sketch/tx_000000000000_ready/cat/s{at}.png"
        photo = f"EXTEND_image_sketchy_ready/cat/p{at // 2}.jpg"
        lines.append(f"cat {sketch} {photo}")
        if with_images:
            write_images(root, [sketch, photo])
    write_lines(root, "zeroshot1/training_sketchy.txt", lines)
    return [{}]


WRITERS = {
    "fashioniq": fashioniq,
    "cirr": cirr,
    "circo": circo,
    "genecis": genecis,
    "lasco": lasco,
    "llavasco": llavasco,
    "dtin": dtin,
    "sketchy": sketchy,
    "tuberlin": tuberlin,
    "quickdraw": quickdraw,
    "training_sketchy": training_sketchy,
}
