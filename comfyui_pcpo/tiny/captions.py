"""The little world of the embedded models: what a picture can show, and the words for it.

A `Scene` says what is in a picture; `caption` writes it in words, leaving out what is None; `parse` reads it back.
Captions are compositional, so some pairs of object and background never appear in training (`is_held_out`) and
prompt following can be measured on them.
"""

import itertools
import zlib
from dataclasses import dataclass, replace

# singular -> (plural, code point of the emoji)
OBJECTS: dict[str, tuple[str, int]] = {
    "fox": ("foxes", 0x1F98A),
    "panda": ("pandas", 0x1F43C),
    "frog": ("frogs", 0x1F438),
    "pig": ("pigs", 0x1F437),
    "octopus": ("octopuses", 0x1F419),
    "butterfly": ("butterflies", 0x1F98B),
    "sunflower": ("sunflowers", 0x1F33B),
    "tree": ("trees", 0x1F333),
    "mushroom": ("mushrooms", 0x1F344),
    "apple": ("apples", 0x1F34E),
    "banana": ("bananas", 0x1F34C),
    "pizza": ("pizzas", 0x1F355),
    "donut": ("donuts", 0x1F369),
    "heart": ("hearts", 0x2764),
    "star": ("stars", 0x2B50),
    "rocket": ("rockets", 0x1F680),
    "car": ("cars", 0x1F697),
    "house": ("houses", 0x1F3E0),
    "balloon": ("balloons", 0x1F388),
    "cactus": ("cacti", 0x1F335),
}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 57, 52),
    "orange": (240, 140, 40),
    "yellow": (246, 212, 76),
    "green": (72, 160, 84),
    "blue": (66, 118, 208),
    "purple": (136, 84, 176),
    "pink": (242, 158, 190),
    "white": (244, 243, 238),
}
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "big")
COUNTS = {1: "a", 2: "two", 3: "three"}
PLURALS = {plural: name for name, (plural, _) in OBJECTS.items()}
VOCABULARY = sorted({*OBJECTS, *PLURALS, *COLORS, *PATTERNS, *SIZES, *COUNTS.values(), "an", "and", "on", "background"})


@dataclass(frozen=True)
class Scene:
    """What a picture shows. None means "not said": any value fits."""

    objects: tuple[str, ...]  # one kind, or two different kinds side by side (left, right)
    count: int = 1  # how many of the one kind; 1 for a pair
    size: str | None = None  # of a single object
    color: str | None = None  # of the background
    pattern: str | None = None

    @property
    def total(self) -> int:
        """How many objects there are in the picture."""
        return self.count * len(self.objects)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene) -> str:
    """A scene in words: `two foxes on a striped blue background`."""
    if scene.count > 1:
        words = [COUNTS[scene.count], OBJECTS[scene.objects[0]][0]]
    elif len(scene.objects) == 2:
        left, right = scene.objects
        words = [article(left), left, "and", article(right), right]
    else:
        noun = [scene.size, scene.objects[0]] if scene.size else [scene.objects[0]]
        words = [article(noun[0]), *noun]
    if scene.color is not None:
        tail = [scene.pattern, scene.color] if scene.pattern else [scene.color]
        words += ["on", article(tail[0]), *tail, "background"]
    return " ".join(words)


def parse(text: str) -> Scene | None:
    """The scene that `text` describes, or None where it says something else than this little world knows."""
    words = [w for w in text.lower().split() if w not in ("a", "an", "and", "on", "background")]
    objects: list[str] = []
    count, size, color, pattern = 1, None, None, None
    numbers = {word: n for n, word in COUNTS.items() if n > 1}
    for word in words:
        if word in OBJECTS or word in PLURALS:
            objects.append(PLURALS.get(word, word))
        elif word in numbers:
            count = numbers[word]
        elif word in SIZES:
            size = word
        elif word in COLORS:
            color = word
        elif word in PATTERNS:
            pattern = word
        else:
            return None
    if not 1 <= len(objects) <= 2 or (count > 1 and len(objects) > 1):
        return None
    return Scene(tuple(objects), count, size, color, pattern)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene combines an object with a background colour that training never shows (about one in ten)."""
    return scene.color is not None and any(
        zlib.crc32(f"{name}|{scene.color}".encode()) % 10 == 0 for name in scene.objects
    )


def held_out_prompts() -> list[str]:
    """Every single-object prompt whose object and colour were never seen together, with and without a pattern."""
    scenes = [
        Scene((name,), count, None, color, pattern)
        for name, color, count, pattern in itertools.product(OBJECTS, COLORS, COUNTS, (None, *PATTERNS))
    ]
    return [caption(scene) for scene in scenes if is_held_out(scene)]


def forget(scene: Scene, keep_size: bool, keep_color: bool, keep_pattern: bool) -> Scene:
    """The scene with some of it left unsaid; a pattern is only said together with its colour."""
    return replace(
        scene,
        size=scene.size if keep_size else None,
        color=scene.color if keep_color else None,
        pattern=scene.pattern if keep_color and keep_pattern else None,
    )
