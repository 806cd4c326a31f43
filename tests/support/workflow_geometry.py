"""Where ComfyUI's page draws the nodes and wires of a workflow file: rectangles, slots and splines, in graph units."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

TITLE, SLOT, WIDGET = 30, 20, 24  # heights of a title bar, a slot, a widget
SLOT_INSET, SLOT_OFFSET = 10, 14  # of a slot's centre, from the side and from the top of its row
REROUTE_OFFSET = 20  # most distance of a reroute's control points, LiteGraph.Reroute.SplineOffset
LETTER = 7  # mean width of a title's letter

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Drawing:
    def __init__(self, workflow: dict):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        extra = workflow.get("extra", {})
        self.reroutes = {reroute["id"]: reroute for reroute in extra.get("reroutes", ())}
        self.last_reroute = {link["id"]: link["parentId"] for link in extra.get("linkExtensions", ())}

    def box(self, node: dict) -> Box:
        """A node with its title bar."""
        (x, y), (width, height) = node["pos"], node["size"]
        if node["flags"].get("collapsed"):
            return x, y - TITLE, x + min(width, 2 * TITLE + LETTER * len(node.get("title", ""))), y
        return x, y - TITLE, x + width, y + height

    def bounds(self) -> Box:
        left, top, right, bottom = zip(*map(self.box, self.nodes.values()), strict=True)
        return min(left), min(top), max(right), max(bottom)

    def output(self, node: dict, slot: int) -> Point:
        _, top, right, bottom = self.box(node)
        if node["flags"].get("collapsed"):
            return right, (top + bottom) / 2
        return right - SLOT_INSET, top + TITLE + SLOT_OFFSET + SLOT * slot

    def input(self, node: dict, slot: int) -> Point:
        left, top, _, bottom = self.box(node)
        if node["flags"].get("collapsed"):
            return left, (top + bottom) / 2
        if "widget" in node["inputs"][slot]:
            return left + SLOT_INSET, bottom - WIDGET + 2  # only a node's last widget is ever linked here
        above = sum("widget" not in entry for entry in node["inputs"][:slot])
        return left + SLOT_INSET, top + TITLE + SLOT_OFFSET + SLOT * above

    def stations(self, link: int) -> list[int]:
        """The reroutes of a link, from its output to its input."""
        found, current = [], self.last_reroute.get(link)
        while current is not None:
            found.append(current)
            current = self.reroutes[current].get("parentId")
        return found[::-1]

    def points(self, link: int) -> list[Point]:
        _, origin, out, target, into, _ = self.links[link]
        between = [tuple(self.reroutes[k]["pos"]) for k in self.stations(link)]
        return [self.output(self.nodes[origin], out), *between, self.input(self.nodes[target], into)]

    def direction(self, reroute: int) -> tuple[Point, float]:
        """The unit tangent at a reroute, between the way in and the mean way out, and the length of the way in."""
        (x, y), before, ways = self.reroutes[reroute]["pos"], (0.0, 0.0), []
        for link in self.reroutes[reroute]["linkIds"]:
            points, place = self.points(link), self.stations(link).index(reroute) + 1
            before, following = points[place - 1], points[place + 1]
            ways.append(math.atan2(following[1] - y, following[0] - x))
        mean, arriving = sum(ways) / len(ways), math.atan2(y - before[1], x - before[0])
        turn = (arriving - mean) / 2
        angle = arriving - (turn + math.pi if abs(turn) > math.pi / 2 else turn)
        return (math.cos(angle), math.sin(angle)), math.dist(before, (x, y))

    def curves(self, link: int) -> Iterator[list[Point]]:
        """The four Bezier points of each part of a link."""
        points, stations = self.points(link), self.stations(link)
        for i, (start, end) in enumerate(pairwise(points)):
            reach = math.dist(start, end) / 4
            leave, arrive = (reach, 0.0), (-reach, 0.0)
            if i:
                (cos, sin), _ = self.direction(stations[i - 1])
                leave = (min(REROUTE_OFFSET, reach) * cos, min(REROUTE_OFFSET, reach) * sin)
            if i < len(stations):
                (cos, sin), way = self.direction(stations[i])
                arrive = (-min(REROUTE_OFFSET, way / 4) * cos, -min(REROUTE_OFFSET, way / 4) * sin)
            yield [start, (start[0] + leave[0], start[1] + leave[1]), (end[0] + arrive[0], end[1] + arrive[1]), end]

    def path(self, link: int, samples: int = 80) -> list[Point]:
        return [bezier(curve, k / samples) for curve in self.curves(link) for k in range(samples + 1)]

    def hidden(self, link: int, depth: float = 2) -> set[int]:
        """The nodes that a link runs behind by more than `depth`, in its own two nodes by more than a slot's inset."""
        _, origin, _, target, _, _ = self.links[link]
        path, found = self.path(link), set()
        for node in self.nodes.values():
            margin = SLOT_INSET + depth if node["id"] in (origin, target) else depth
            left, top, right, bottom = self.box(node)
            if any(left + margin < x < right - margin and top + depth < y < bottom - depth for x, y in path):
                found.add(node["id"])
        return found

    def overlaps(self, gap: float = 0) -> list[tuple[int, int]]:
        """Pairs of nodes that overlap, or are closer than `gap`."""
        boxes = {key: self.box(node) for key, node in self.nodes.items()}
        return [
            (a, b) for a in boxes for b in boxes if a < b
            and boxes[a][0] < boxes[b][2] + gap and boxes[b][0] < boxes[a][2] + gap
            and boxes[a][1] < boxes[b][3] + gap and boxes[b][1] < boxes[a][3] + gap
        ]  # fmt: skip


def bezier(curve: list[Point], t: float) -> Point:
    s = 1 - t
    weights = (s**3, 3 * s * s * t, 3 * s * t * t, t**3)
    x, y = (sum(w * point[axis] for w, point in zip(weights, curve, strict=True)) for axis in (0, 1))
    return x, y


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
