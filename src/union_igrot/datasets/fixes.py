"""Corrections of captions and labels by other authors, read from their files if asked for.

- Spelling of FashionIQ's captions: haokunwen/DQU-CIR, `correction_dict_<category>.json`, words by words. Some of its
  entries are wrong.
- Several targets of CIRR and FashionIQ: jjungyujin/SoFT, `multi_target_selection`, other images with a confidence.
"""

import string
from collections.abc import Callable

from union_igrot.datasets.annotations import DatasetFolder, check_record, check_text, read_records
from union_igrot.errors import DataError
from union_igrot.storage.text import read_json

_BLANKED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def read_spelling(folder: DatasetFolder, category: str) -> Callable[[str], str]:
    """Return the function that corrects a caption of FashionIQ: lower case, no punctuation, words replaced."""
    name = f"correction_dict_{category}.json"
    file = folder.annotation(f"captions/{name}", name)
    given = check_record(read_json(file), str(file)).fields
    words = {word: check_text(right, word, str(file)) for word, right in given.items()}
    return lambda text: " ".join(words.get(word, word) for word in text.lower().translate(_BLANKED).split())


class SeveralTargets:
    """The targets of queries by reference and target; the query's own target first."""

    def __init__(self, folder: DatasetFolder, name: str | None) -> None:
        self._found: dict[tuple[str, str], tuple[str, ...]] = {}
        self._name, self._places, self._used = name, dict[tuple[str, str], str](), 0
        for row in read_records(folder.annotation(name)) if name else ():
            reference, target = row.name("reference_image_name"), row.name("target_image_name")
            threshold, scores = row.get("threshold"), row.record("confidence_scores").fields
            for value in (threshold, *scores.values()):
                if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                    raise DataError(f"{row.place}: {value!r} is not a threshold or score; expected a number 0..1")
            others = (one for one, score in scores.items() if score >= threshold and one not in (reference, target))
            self._found[reference, target] = (target, *others)
            self._places[reference, target] = row.place

    def of(self, reference: str, target: str, known: dict[str, str]) -> tuple[str, ...]:
        """Return the targets of a query, all of them in the gallery of `known` ids."""
        targets = self._found.get((reference, target), (target,))
        for one in targets:
            if one not in known and one != target:
                raise DataError(f"{self._places[reference, target]}: {one!r} is not in the gallery; check the split")
        self._used += (reference, target) in self._found
        return targets

    @property
    def note(self) -> str:
        """A clause on the targets for the protocol; empty without a file.

        Raises:
            DataError: If the file has no row of the queries.
        """
        if self._found and not self._used:
            raise DataError(f"{self._name}: has no row of these queries; pass the file of the same split and category")
        return f"; several targets of {self._name} for {self._used:,} queries" if self._name else ""
