"""Where a benchmark's files are: the first place that exists, and one error for all that are missing.

Knows that a dataset is laid out in several ways in public. Does not know what is in a file.
"""

import os
from pathlib import Path
from typing import final

from union_igrot.errors import DataError, ImageError
from union_igrot.images.decode import check_image
from union_igrot.storage.paths import expand_user


@final
class Files:
    """The folder of one benchmark: its annotation files and its images.

    Args:
        root: The folder.
        check: Whether to look that each image exists. Otherwise the first place an image may have is taken.

    Raises:
        DataError: Where there is no such folder.
    """

    def __init__(self, root: str | Path, check: bool) -> None:
        self.root = expand_user(root).absolute()
        self.check = check
        self._found: dict[str, Path] = {}
        self._missing: list[str] = []
        if not os.path.isdir(self.root):  # noqa: PTH112
            raise DataError(f"{self.root}: there is no such folder; give the folder that holds the dataset")

    def annotation(self, *places: str) -> Path:
        """Return the annotation file in the first of its known places where it exists."""
        for place in places:
            if os.path.isfile(self.root / place):  # noqa: PTH113  (unlike Path's, it never raises)
                return self.root / place
        raise DataError(f"{self.root}: holds no {' or '.join(places)}; download it, or give another folder")

    def image(self, where: str, *places: str) -> Path:
        """Return an image's path: the first of its known places where it exists. Notes a missing one."""
        if places[0] in self._found:
            return self._found[places[0]]
        path = self.root / places[0]
        if self.check:
            fault = ""
            for place in places:
                try:
                    check_image(self.root / place)
                except ImageError as error:
                    fault = fault or str(error)
                else:
                    path = self.root / place
                    break
            else:
                others = f" (looked for {', '.join(places[1:])} too)" if len(places) > 1 else ""
                self._missing.append(f"{where}: {fault}{others}")
        self._found[places[0]] = path
        return path

    def close(self) -> None:
        """Raise one ImageError where images are missing, naming the first and how many there are."""
        if self._missing:
            raise ImageError(
                f"{self._missing[0]}; {len(self._missing)} of {len(self._found)} images are missing: complete the "
                "download, or read the annotations alone with check_images=False"
            )
