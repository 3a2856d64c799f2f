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


def _rows(root, path, rows, separator=" "):
    write_lines(root, path, [separator.join(row) for row in rows])


def _freedom(root, name, domains, with_images, query_classes=2):
    rows = [
        (f"{name}/{domain}/class{label}/{domain}_{label}_{number}.jpg", domain, f"class{label}")
        for domain in domains
        for label in range(3)
        for number in range(2)
    ]
    if with_images:
        write_images(root, [row[0] for row in rows])
    return rows


def nico(root, with_images=True):
    rows = _freedom(root, "nico", ("autumn", "dim", "grass"), with_images)
    _rows(root, "database_files.csv", rows)
    _rows(root, "query_files.csv", rows[:7:2])
    return [{}]


def minidn(root, with_images=True):
    rows = _freedom(root, "minidn", ("clipart", "painting", "real", "sketch"), with_images)
    _rows(root, "database_files.csv", rows)
    _rows(root, "query_files.csv", rows[:9:2])
    return [{}]


def ltll(root, with_images=True):
    _rows(root, "full_files.csv", _freedom(root, "ltll", ("New", "Old"), with_images))
    return [{}]


def imagenet_r(root, with_images=True):
    dtin(root, with_images)
    return [{}]


ATTRIBUTES = ("color", "context", "density", "existence", "quantity", "shape")


def patterncom(root, with_images=True):
    names = [f"{label}{number:03d}.jpg" for label in ("bridge", "overpass", "forest") for number in range(4)]
    _rows(root, "patternnet.csv", [(f"images/{name}", "0", name[:-7]) for name in names])
    for attribute in ATTRIBUTES:
        values = [(name, attribute, ("red", "dark blue")[at % 2]) for at, name in enumerate(names[:10])]
        _rows(root, f"PatternCom/{attribute}.csv", values, ",")
    if with_images:
        write_images(root, [f"images/{name}" for name in names])
    return [{"attribute": attribute} for attribute in ATTRIBUTES]


def icir(root, with_images=True):
    database, queries = [], []
    for instance in ("temple", "mug"):
        for text in ("at night", "as a drawing"):
            database += [(f"icir/database/{instance}/{text[:2]}{at}.jpg", text, instance) for at in range(2)]
        database += [(f"icir/database/{instance}/hn/{at}.jpg", "none", instance) for at in range(3)]
        texts = ("at night", "as a drawing")
        queries += [(f"icir/query/{instance}/{at}.jpg", text, instance) for at in range(2) for text in texts]
    _rows(root, "database_files.csv", database, ",")
    _rows(root, "query_files.csv", queries, ",")
    if with_images:
        write_images(root, {row[0].removeprefix("icir/") for row in (*database, *queries)})
    return [{}]


def fscoco(root, with_images=True):
    numbers = [100 + 7 * at for at in range(6)]
    for at, number in enumerate(numbers):
        name = f"{at % 2 + 1}/{number:012d}"
        write_lines(root, f"text/{name}.txt", [f"A man near {number}"])
        if with_images:
            write_images(root, [f"images/{name}.jpg", f"raster_sketches/{name}.jpg"])
    write_lines(root, "val_normal.txt", [f"{number:012d}" for number in numbers[:5]])
    write_lines(root, "val_unseen_user.txt", numbers[::2])
    return [{"query": "both"}, {"query": "sketch"}, {"query": "text"}, {"split": "val_unseen_user"}]


def cstbir(root, with_images=True):
    rows = []
    for at in range(9):
        label = ("camel", "hot dog")[at % 2]
        rows.append({"sample_num": at, "text": f"[sketch] in front of {at}", "image": f"{at // 2}.jpg", "label": label})
        rows[-1] |= {"sketch": f"{label}_{at}.jpg", "split": "val" if at == 8 else "test"}
    write_json(root, "CSTBIR_dataset.json", rows)
    if with_images:
        write_images(root, {f"VG_100K/{row['image']}" for row in rows})
        write_images(root, [f"sketches/{row['sketch']}" for row in rows])
    return [{}, {"split": "val"}]


def _qmul(root, name, with_images):
    photos = [f"{1000 + at}.png" for at in range(5)]
    sketches = [f"{photo[:-4]}_{number}.svg" for photo in photos[:4] for number in (1, 2)]
    for split in ("test", "train"):
        write_lines(root, f"photo_{split}.txt", photos)
        write_lines(root, f"sketch_{split}.txt", sketches)
    if with_images:
        write_images(root, [f"{name}_photo/{photo}" for photo in photos])
        write_images(root, [f"{name}_sketch_png/{sketch[:-4]}.png" for sketch in sketches])
    return [{}]


def shoev2(root, with_images=True):
    return _qmul(root, "ShoeV2", with_images)


def chairv2(root, with_images=True):
    return _qmul(root, "ChairV2", with_images)


def circled(root, with_images=True):
    root = Path(root)
    fashioniq(root / "fashioniq", with_images)
    cirr(root / "cirr", with_images)
    circo(root / "circo", with_images)
    names = {category: [f"B{category[0].upper()}v{number:03d}" for number in range(8)] for category in CATEGORIES}
    names |= {"cirr": [f"val-{at}-0-img0" for at in range(8)], "circo": [1000 + 7 * at for at in range(8)]}
    for subset, images in names.items():
        sessions = []
        for at, turns in enumerate((3, 2)):
            listed = [
                {"turn": turn + 1, "reference_image_id": images[at + turn], "relative_caption": f"more {turn}"}
                for turn in range(turns)
            ]
            session = {"session_id": f"{subset}_{at}", "subset": subset, "ground_truth_ids": [images[at + 4]]}
            sessions.append(session | {"num_turns": turns, "turns": listed})
        prefix = "" if subset in ("cirr", "circo") else "fashioniq_"
        write_json(root, f"{prefix}{subset}_val.json", sessions)
    return [{"subset": subset} for subset in names]


def mmeb(root, with_images=True):
    for task in ("CIRR", "FashionIQ"):
        paths = [f"{task}/{at}.jpg" for at in range(6)]
        rows = [
            {
                "qry_inst": "<|image_1|>\nGiven an image, find another:",
                "qry_text": f"with {at} bottles",
                "qry_img_path": paths[at],
                "tgt_inst": "Represent the image",
                "tgt_text": ["<|image_1|>"] * 3,
                "tgt_img_path": paths[at + 1 : at + 4],
            }
            for at in range(3)
        ]
        write_lines(root, f"{task}.jsonl", map(json.dumps, rows))
        if with_images:
            write_images(root, [f"image-tasks/{path}" for path in paths])
    return [{"task": "CIRR"}, {"task": "FashionIQ"}]


def sketchy_instances(root, with_images=True):
    lists = ("sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt")
    for folder in ("zeroshot0", "zeroshot1"):
        for kind in ("zero", "train"):
            suffix = "_zero" if kind == "zero" else ""
            write_lines(root, f"{folder}/cname_cid{suffix}.txt", [f"{name} {at}" for at, name in enumerate(CLASSES)])
            place = "256x256/{}/tx_000000000000_ready/{}/n{}_{}"
            photos = [(f"{place.format('photo', name, at, 7)}.jpg", at) for at, name in enumerate(CLASSES)]
            photos += [(f"{place.format('photo', name, at, 9)}.jpg", at) for at, name in enumerate(CLASSES)]
            sketches = [
                (f"{place.format('sketch', name, at, 7)}-{n}.png", at)
                for at, name in enumerate(CLASSES)
                for n in (1, 2)
            ]
            extra = [(f"EXTEND_image_sketchy_ready/{name}/ext_{kind}.jpg", at) for at, name in enumerate(CLASSES)]
            for listing, rows in zip(lists, (sketches, photos + extra), strict=True):
                write_lines(root, f"{folder}/{listing.format(kind)}", [f"{path} {label}" for path, label in rows])
                if with_images:
                    write_images(root, [path for path, _ in rows])
    return [{"gallery": "class"}, {"gallery": "all"}]


GENERALIZED = ("all_seen", "seen_fifth", "seen_classes")


def sketchy_generalized(root, with_images=True):
    sketchy(root, with_images)
    return [{"protocol": protocol} for protocol in GENERALIZED]


def tuberlin_generalized(root, with_images=True):
    tuberlin(root, with_images)
    return [{"protocol": protocol} for protocol in GENERALIZED]


WRITERS |= {
    one.__name__: one
    for one in (
        *(nico, minidn, ltll, imagenet_r, patterncom, icir, fscoco, cstbir, shoev2, chairv2, circled, mmeb),
        *(sketchy_instances, sketchy_generalized, tuberlin_generalized),
    )
}
