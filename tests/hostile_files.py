"""Files as no folder should hold them: broken, odd and malicious ones, and what has to become of each.

Every sound image shows the same four quarters, bright to dark from the left top by rows, however it is
stored. Knows formats. Does not know what is tested with it.
"""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

Fate = Literal["row", "listed", "left out"]
"""Indexed right side up, listed with a reason, or not looked at (hidden)."""
QUARTERS = np.array([[230, 160], [90, 20]])
_NAMES = (
    "plain",
    " blanks before and after ",
    "two\nlines",
    "tab\there",
    "Überraschung",
    "雪の写真",
    "صورة",
    "🦊",
    "quote'\"`",
    "back\\slash",
    "${not} {a} thing",
    "[brackets] *? ",
    "-dash",
    "#hash",
    "comma,=semi;",
    "percent%20",
    "a" * 200,
    "no.text.\udcff\udcfe",
)


def pixels(size: int) -> np.ndarray:
    """The four quarters, a little noisy so that no two files are equal."""
    return np.kron(QUARTERS, np.ones((size // 2, size // 2), dtype=int)).astype(np.uint8)


def upright(number: int) -> Image.Image:
    side = 40 + 2 * (number % 7)
    noise = np.random.default_rng(number).integers(0, 8, (side, side, 3))
    return Image.fromarray((pixels(side)[..., None] + noise).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(number: int) -> bytes:
    """Stored on its side or mirrored, with the EXIF orientation that undoes it."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    orientation = 1 + number % 8
    image, back = upright(number), undo[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(image if back is None else image.transpose(back), "JPEG", quality=95, exif=exif)


def sixteen_bit(number: int) -> bytes:
    grey = np.asarray(upright(number).convert("L")).astype(np.uint16) * 257
    return saved(Image.fromarray(grey), "PNG" if number % 2 else "TIFF")


def animated(number: int) -> bytes:
    kind = ("GIF", "PNG", "WEBP")[number % 3]
    first = upright(number)
    rest = [Image.new("RGB", first.size, colour) for colour in ("red", "green")]
    return saved(first, kind, save_all=True, append_images=rest, duration=50)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(number: int) -> bytes:
    """A PNG of some hundred bytes that says it has 3.6 thousand million pixels, or text that swells to 64 MB."""
    start = b"\x89PNG\r\n\x1a\n"
    if number % 2:
        head = struct.pack(">IIBBBBB", 60_000, 60_000 + number, 8, 2, 0, 0, 0)
        return start + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    whole = saved(upright(number), "PNG")
    swelling = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26 + number)))
    return whole[:33] + swelling + whole[33:]


def corrupt_exif(number: int) -> bytes:
    return saved(upright(number), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff" + bytes([number % 256]) * 20)


def cmyk(number: int) -> bytes:
    return saved(upright(number).convert("CMYK"), "JPEG", quality=95)


def palette(number: int) -> bytes:
    if number % 2:
        return saved(upright(number).quantize(64), "GIF")
    # One color of the palette is transparent, and does not occur.
    image = upright(number).quantize(64)
    return saved(image, "PNG", transparency=255)


def see_through(number: int) -> bytes:
    image = upright(number).convert("RGBA")
    return saved(image, "PNG") if number % 2 else saved(image.convert("LA"), "PNG")


def strip(number: int) -> bytes:
    tall = Image.fromarray(np.repeat(QUARTERS[:, :1].astype(np.uint8), 2000 + number, axis=0).reshape(-1, 1))
    return saved(tall, "PNG")


def half(number: int) -> bytes:
    whole = saved(upright(number), ("PNG", "JPEG", "WEBP", "TIFF")[number % 4])
    return whole[: len(whole) // 2]


def flipped_bits(number: int) -> bytes:
    """A PNG whose data fail their checksum."""
    whole = bytearray(saved(upright(number), "PNG"))
    whole[whole.index(b"IDAT") + 20] ^= 255
    return bytes(whole)


_MADE: tuple[tuple[str, Callable[[int], bytes], Fate], ...] = (
    (".jpg", lambda n: saved(upright(n), "JPEG", quality=95), "row"),
    (".jpg", lambda n: saved(upright(n), "PNG"), "row"),
    (".txt", lambda n: saved(upright(n), "JPEG", quality=95), "row"),
    ("", lambda n: saved(upright(n), "WEBP", lossless=True), "row"),
    (".jpg", turned, "row"),
    (".JPEG", turned, "row"),
    (".jpg", corrupt_exif, "row"),
    (".jpg", cmyk, "row"),
    (".png", palette, "row"),
    (".png", see_through, "row"),
    (".tif", sixteen_bit, "row"),
    (".gif", animated, "row"),
    (".bmp", lambda n: saved(upright(n), "BMP"), "row"),
    (".png", half, "listed"),
    (".jpg", half, "listed"),
    (".png", flipped_bits, "listed"),
    (".png", lambda _: b"", "listed"),
    (".png", bomb, "listed"),
    (".jpg", lambda n: b"\xff\xd8\xff\xe0" + bytes([n % 256]) * 50, "listed"),
    (".jpg", lambda n: np.random.default_rng(n).bytes(300), "listed"),
    (".html", lambda n: f"<html>{n}</html>".encode(), "listed"),
    (".webp", lambda n: saved(upright(n), "WEBP")[:40] + bytes([n % 256]) * 40, "listed"),
)


def _place(root: Path, number: int) -> Path:
    return root / f"folder {number % 5}.jpg" / f"{number:04d} {_NAMES[number % len(_NAMES)]}"


def _special(root: Path) -> Iterator[tuple[str, Fate]]:
    """What is no regular file."""
    root.mkdir(parents=True, exist_ok=True)
    os.mkfifo(root / "pipe.jpg")
    yield "pipe.jpg", "listed"
    plug = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root)  # a socket's path is short
    plug.bind("socket.png")
    os.chdir(here)
    plug.close()
    yield "socket.png", "listed"
    (root / "loop.jpg").symlink_to("loop.jpg")
    yield "loop.jpg", "listed"
    (root / "nowhere.jpg").symlink_to("not there")
    yield "nowhere.jpg", "listed"
    (root / "round").symlink_to(root)
    (root / "above").symlink_to(root.parent)
    (root / ".hidden.jpg").write_bytes(saved(upright(1), "JPEG"))
    yield ".hidden.jpg", "left out"
    (root / "sound.jpg").write_bytes(saved(upright(2), "JPEG", quality=95))
    yield "sound.jpg", "row"
    (root / "link.jpg").symlink_to("sound.jpg")
    yield "link.jpg", "row"
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(2**33)
    yield "sparse.jpg", "listed"
    (root / "empty folder.png").mkdir()


def hostile_folder(root: Path, files: int) -> dict[str, Fate]:
    """Fill a folder.

    Returns:
        What has to become of each file, by its path.
    """
    special = root / "special"
    fates: dict[str, Fate] = {str(special / name): fate for name, fate in _special(special)}
    for number in islice(count(), files - len(fates)):
        suffix, make, fate = _MADE[number % len(_MADE)]
        path = Path(f"{_place(root, number)}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(number))
        fates[str(path)] = fate
    return fates


def is_upright(thumbnail: bytes) -> bool:
    """Whether a small image shows the quarters as they should be."""
    with Image.open(io.BytesIO(thumbnail)) as image:
        grey = np.asarray(image.convert("L")).astype(int)
    high, wide = (side // 2 for side in grey.shape)
    quarters = [
        grey[rows, columns].mean()
        for rows in (slice(high), slice(high, None))
        for columns in (slice(wide), slice(wide, None))
    ]
    return all(abs(seen - meant) < 30 for seen, meant in zip(quarters, QUARTERS.flatten(), strict=True))
