"""Image formats: which ones are decoded, which file names are images, and what other files are.

All readers of folders use this list, and every decoder opens these formats alone: none of them starts another program,
as PostScript would.
"""

import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

from PIL import Image

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "JXL": (".jxl",),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "DDS": (".dds",),
    "SGI": (".sgi",),
    "PCX": (".pcx",),
    "ICO": (".ico",),
    "ICNS": (".icns",),
    "TGA": (".tga",),
}
"""Suffixes by Pillow's name of the format. HEIF and JXL need a plug-in."""
IMAGE_SUFFIXES: Final = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
SERVICE_NAMES: Final = frozenset(
    {
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__macosx",
        "thumbs.db",
        "desktop.ini",
    }
)
"""Folders and files, in lower case, that storage devices and systems make for themselves."""

_PLUGINS: Final = ("pillow_heif", "pillow_jxl")
_RAW: Final = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mef",
    ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw", ".x3f",
)  # fmt: skip
_INSTALL_HEIF: Final = 'HEIC image; to read it pip install "union-igrot[heif]"'
_INSTALL_JXL: Final = "JPEG XL image; to read it pip install pillow-jxl-plugin"
_IS_RAW: Final = "camera RAW file, which is not decoded; export it as JPEG or TIFF"
_IS_VECTOR: Final = "vector drawing, which is not rendered; export it as PNG"
_IS_VIDEO: Final = "video"
_KINDS: Final = (
    ((".heic", ".heif", ".hif"), _INSTALL_HEIF),
    ((".jxl",), _INSTALL_JXL),
    (_RAW, _IS_RAW),
    ((".svg", ".svgz", ".eps", ".ps", ".pdf", ".ai", ".wmf", ".emf"), _IS_VECTOR),
    ((".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp"), _IS_VIDEO),
)
_HEADS: Final = (
    (b"\xff\x0a", _INSTALL_JXL),
    (b"\x00\x00\x00\x0cJXL ", _INSTALL_JXL),
    (b"FUJIFILMCCD-RAW", _IS_RAW),
    (b"IIRO", _IS_RAW),
    (b"IIU\x00", _IS_RAW),
    (b"FOVb", _IS_RAW),
    (b"\x00MRM", _IS_RAW),
    (b"%!PS", _IS_VECTOR),
    (b"\xc5\xd0\xd3\xc6", _IS_VECTOR),
    (b"%PDF", _IS_VECTOR),
    (b"<svg", _IS_VECTOR),
    (b"\x1aE\xdf\xa3", _IS_VIDEO),
)
_BRANDS: Final = {b"crx ": _IS_RAW} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), _INSTALL_HEIF
)


def is_image_name(name: str) -> bool:
    """Return whether a file's name has the suffix of an image format, in upper or lower case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_raw(name: str) -> bool:
    """Return whether a file's name is that of a camera's RAW file."""
    return name.lower().endswith(_RAW)


def is_ignored(name: str) -> bool:
    """Return whether a file or folder is left out of every listing: hidden, or one of `SERVICE_NAMES`."""
    return name.startswith(".") or name.lower() in SERVICE_NAMES


@cache
def decoded_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are decoded here; loads the installed plug-ins."""
    Image.init()
    for module in _PLUGINS:
        if importlib.util.find_spec(module) is not None:
            plugin = importlib.import_module(module)  # registers itself, or by a call
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def unknown_format(head: bytes, name: str = "") -> str:
    """Describe a file that has none of the formats."""
    found = next((kind for start, kind in _HEADS if head.lstrip().startswith(start)), "")
    if head[4:8] == b"ftyp":
        found = _BRANDS.get(head[8:12], _IS_VIDEO)
    if found in _installed():
        return f"damaged {found.partition(';')[0]}"
    return found or describe_name(name) or "no known image format"


def describe_name(name: str) -> str:
    """Return why a file is not decoded, as far as its suffix tells; otherwise an empty text."""
    kind = next((kind for suffixes, kind in _KINDS if name.lower().endswith(suffixes)), "")
    return "" if kind in _installed() else kind


def _installed() -> set[str]:
    """Return the advice to install a plug-in that is followed already."""
    return {kind for kind, name in ((_INSTALL_HEIF, "HEIF"), (_INSTALL_JXL, "JXL")) if name in decoded_formats()}


def describe_unused(names: Iterable[str]) -> str:
    """Describe files of a folder that are not used, for a message: `5 other files (3 .txt, 2 .nef: camera RAW ...)`."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)  # noqa: PTH122 - names alone
    if not counts:
        return ""
    kinds = [
        f"{count:,} {suffix}" + (f": {kind}" if (kind := describe_name(suffix)) else "")
        for suffix, count in counts.most_common(5)
    ]
    if len(counts) > len(kinds):
        kinds.append(f"{len(counts) - len(kinds)} other suffixes")
    return f"{counts.total():,} other file{'s' if counts.total() > 1 else ''} ({', '.join(kinds)})"
