"""Galleries of coloured squares for the demo's tests: every answer can be told in advance."""

from typing import final

from PIL import Image

from union_igrot.demo.engines import Answer, Engine, Question
from union_igrot.demo.pictures import encoded
from union_igrot.errors import DataError


@final
class Squares(Engine):
    """Finds pictures in order, turned by the length of the text; remembers what it was asked."""

    def __init__(self, name: str = "forward", count: int = 60, step: int = 1) -> None:
        self.name, self.gallery, self.hint = name, "squares", "Say <anything>."
        self.count, self.step = count, step
        self.asked: list[tuple[tuple[int, int, int] | None, str | None, str | None]] = []
        self.questions: list[Question] = []

    def __len__(self) -> int:
        return self.count

    @property
    def columns(self) -> list[str]:
        return ["class", "taken <by>"]

    def search(self, question: Question, skip: int, count: int) -> list[Answer]:
        self.questions.append(question)
        picture, text = question.picture, question.text
        exclude = question.exclude[0] if question.exclude else None
        middle = None if picture is None else picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))
        self.asked.append((middle, text, exclude))
        if text == "break":
            raise RuntimeError("a defect inside")
        order = [f"s{(len(text or '') + self.step * place) % self.count}" for place in range(self.count)]
        if question.where == "nothing":
            return []
        gone = {*question.exclude, *question.disliked}
        found = [name for name in order if name not in gone][skip : skip + count]
        return [self._answer(name, 1 - (skip + place) / 100) for place, name in enumerate(found)]

    def some(self, count: int, deal: int) -> list[Answer]:
        return [self._answer(f"s{(deal + place) % self.count}") for place in range(min(count, self.count))]

    def answer(self, name: str) -> Answer:
        return self._answer(name)

    def picture(self, name: str) -> Image.Image:
        return Image.new("RGB", (640, 480), self._colour(name))

    def _colour(self, name: str) -> tuple[int, int, int]:
        number = int(name.removeprefix("s"))
        if number >= self.count:
            raise DataError("not here")
        return (4 * number, 100, 200)

    def _answer(self, name: str, score: float | None = None) -> Answer:
        small = encoded(Image.new("RGB", (40, 30), self._colour(name)))
        return Answer(name, f"square <{name}>", small, score, f"/pictures/{name}.png", {"class": f"c&{name}"})
