"""The world of the embedded models: what an image can show, and the words for it.

A `Scene` states what is in an image; `caption` writes it in words, leaving out what is None; `parse` reads it back.
Captions are compositional. Three families of combinations never appear in training (`is_held_out`), so that prompt
following can be measured on them: a thing with a background colour, two things in one image, a colour on a shape.
Where a prompt leaves size, relation or background open, any is correct, though drawings show the usual ones.
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
SHAPE_NAMES: dict[str, str] = {"circle": "circles", "square": "squares", "triangle": "triangles"}
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
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "above")
MOST = max(COUNTS)
PLURALS = {**{name: plural for name, (plural, _) in OBJECTS.items()}, **SHAPE_NAMES}
SINGULARS = {plural: name for name, plural in PLURALS.items()}
# every kind of thing that can be told apart in an image: objects, and shapes in each colour
KINDS = (*OBJECTS, *(f"{color} {shape}" for shape in SHAPE_NAMES for color in COLORS))
VOCABULARY = sorted(
    {*PLURALS, *SINGULARS, *COLORS, *PATTERNS, *SIZES, *COUNTS.values(), "an", "and", "on", "background"}
    | {word for relation in RELATIONS for word in relation.split()}
)


@dataclass(frozen=True)
class Thing:
    """One to four equal objects or shapes."""

    name: str
    count: int = 1
    size: str | None = None  # of a single thing on its own; None: not said, drawn big
    color: str | None = None  # of a shape, which always has one

    @property
    def kind(self) -> str:
        """The entry of KINDS: `fox`, `red square`."""
        return self.name if self.name in OBJECTS else f"{self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    """What an image shows, or what a prompt asks for."""

    things: tuple[Thing, ...]
    # of the first of two single things to the second; None: not said, drawn side by side in this order
    relation: str | None = None
    color: str | None = None  # of the background; None: not said, any
    pattern: str | None = None  # of the background; None: not said, any

    @property
    def total(self) -> int:
        """Number of objects and shapes in the image."""
        return sum(thing.count for thing in self.things)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def phrase(thing: Thing) -> list[str]:
    """Words for a thing: `a small red circle`, `two foxes`."""
    noun = PLURALS[thing.name] if thing.count > 1 else thing.name
    words = [word for word in (thing.size, thing.color, noun) if word is not None]
    return [COUNTS[thing.count] if thing.count > 1 else article(words[0]), *words]


def caption(scene: Scene) -> str:
    """A scene in words: `two foxes and a red square on a striped blue background`."""
    words = phrase(scene.things[0])
    for thing in scene.things[1:]:
        words += [*(scene.relation or "and").split(), *phrase(thing)]
    if scene.color is not None:
        tail = [scene.pattern, scene.color] if scene.pattern else [scene.color]
        words += ["on", article(tail[0]), *tail, "background"]
    return " ".join(words)


def parse(text: str) -> Scene | None:
    """The scene that `text` describes, or None for text from outside this world."""
    front, _, back = text.lower().partition(" on ")
    relation = next((relation for relation in RELATIONS if f" {relation} " in front), None)
    things = [parse_thing(part) for part in front.split(f" {relation or 'and'} ")]
    ground = parse_background(back)
    if ground is None or any(thing is None for thing in things):
        return None
    scene = Scene(tuple(thing for thing in things if thing is not None), relation, *ground)
    return scene if is_valid(scene) else None


def parse_thing(text: str) -> Thing | None:
    """`two red squares` -> Thing; None for words that do not belong to one thing, or a noun of the wrong number."""
    words = text.split()
    numbers = {"an": 1, **{word: n for n, word in COUNTS.items()}}
    count = numbers[words.pop(0)] if words and words[0] in numbers else 1
    size = words.pop(0) if words and words[0] in SIZES else None
    color = words.pop(0) if words and words[0] in COLORS else None
    if len(words) != 1 or words[0] not in (SINGULARS if count > 1 else PLURALS):
        return None
    return Thing(SINGULARS[words[0]] if count > 1 else words[0], count, size, color)


def parse_background(text: str) -> tuple[str | None, str | None] | None:
    """`a striped blue background` -> (blue, striped); an empty text leaves both unsaid; None for other words."""
    words = [word for word in text.split() if word not in ("a", "an", "background")]
    pattern = words.pop(0) if words and words[0] in PATTERNS else None
    color = words.pop(0) if words and words[0] in COLORS else None
    return None if words or (pattern and not color) else (color, pattern)


def is_valid(scene: Scene) -> bool:
    """Whether the world has such a scene: one or two kinds, at most four things, shapes that stand out."""
    kinds = [thing.kind for thing in scene.things]
    single = len(kinds) == 1
    return (
        1 <= len(set(kinds)) == len(kinds) <= 2
        and scene.total <= MOST
        and (scene.relation is None or scene.total == len(kinds) == 2)
        and all(thing.size is None or (single and thing.count == 1) for thing in scene.things)
        and all((thing.name in SHAPE_NAMES) == (thing.color is not None) for thing in scene.things)
        and all(thing.color is None or thing.color != scene.color for thing in scene.things)
    )


def _one_in(parts: int, *words: str) -> bool:
    return zlib.crc32("|".join(words).encode()) % parts == 0


def is_held_out(scene: Scene) -> bool:
    """Whether the scene has a combination that training never shows.

    The families: a thing's name and the background colour; two names in one image; a shape and its colour. Held out are
    about one in ten pairs and backgrounds, and 5 of the 24 coloured shapes.
    """
    names = [thing.name for thing in scene.things]
    return (
        any(scene.color is not None and _one_in(10, name, scene.color) for name in names)
        or (len(names) == 2 and _one_in(10, *sorted(names)))
        or any(thing.color is not None and _one_in(10, "shape", thing.name, thing.color) for thing in scene.things)
    )


def held_out_prompts() -> list[str]:
    """Prompts of one to three equal objects on a colour never seen with them, with and without a pattern."""
    scenes = [
        Scene((Thing(name, count),), None, color, pattern)
        for name, color, count, pattern in itertools.product(OBJECTS, COLORS, (1, 2, 3), (None, *PATTERNS))
    ]
    return [caption(scene) for scene in scenes if is_held_out(scene)]


def held_out_pairs() -> list[str]:
    """Prompts of two objects never seen together: `and`, each relation in both orders, no background said."""
    return [
        caption(Scene((Thing(first), Thing(second)), relation))
        for first, second in itertools.permutations(OBJECTS, 2)
        for relation in (None, *RELATIONS)
        if is_held_out(Scene((Thing(first), Thing(second)))) and (relation is not None or first < second)
    ]


def forget(scene: Scene, relation: bool, size: bool, color: bool, pattern: bool) -> Scene:
    """The scene with only the marked attributes said; a pattern is only said together with its colour."""
    return replace(
        scene,
        things=tuple(thing if size else replace(thing, size=None) for thing in scene.things),
        relation=scene.relation if relation else None,
        color=scene.color if color else None,
        pattern=scene.pattern if color and pattern else None,
    )
