"""Synthetic frontal chest radiographs with lung masks, labels and boxes, for the demo, tests and benchmarks.

    python -m pipeline.phantom OUT --num-images 200 --size-px 256 --seed 0

A phantom is a map of attenuation (body, less lungs, plus heart, bones, vessels, findings), turned into grey by an
exposure curve. Shapes are in unit coordinates (x right, y down, the image is 0..1): a size only changes the sampling.
The same arguments give the same bytes on any processor: OpenCV only sees integers, NumPy adds and multiplies pixels
but never sums over them, and the exposure curve is a table.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tyro

from errors import UserError, exits_on_user_error

# ChestX-ray14's names, and the share of phantoms that show each, drawn independently
FINDING_RATES = {"Cardiomegaly": 0.2, "Effusion": 0.2, "Nodule": 0.2, "Mass": 0.12, "Pneumothorax": 0.12}
Rng = np.random.Generator
RIGHT, LEFT = SIDES = (-1, 1)  # the patient's, as signs of x from the midline: their left is on the image's right
PATIENT, STUDY, VISITS, RECORD, FINDINGS = range(5)  # random streams: a draw more in one moves nothing in another
MIN_SIZE_PX = 32
MIN_CANVAS_PX = 200  # smaller phantoms are drawn larger and averaged: a rib of 2 px has no edges
FIELD_MM = 400
ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
FEMALE_RATE = 0.45
TEST_STRIDE = 7  # every seventh patient is a test patient: phantoms are independent, so this is as fair as a draw


class Box(NamedTuple):
    """Where a finding is: left top corner and extent, in pixels of the image."""

    finding: str
    x: int
    y: int
    w: int
    h: int


class Phantom(NamedTuple):
    """One synthetic radiograph."""

    image: np.ndarray  # uint8 grey [size_px, size_px], dense tissue bright
    lung_mask: np.ndarray  # uint8 [size_px, size_px]: 255 in the lung fields (without the heart, with findings), else 0
    labels: dict[str, int]  # 1 where the finding is there, else 0, for every name of FINDING_RATES in its order
    boxes: list[Box]  # one for each enlarged heart, effusion, pneumothorax, mass and nodule


class Chest:
    """A patient's build. Its points (u, v): u in half widths from the midline, v 0 at the apex, 1 at the right dome."""

    def __init__(self, rng: Rng, breath: float, *, enlarged_heart: bool) -> None:
        self.female = rng.random() < FEMALE_RATE
        self.half_width, self.apex_y, self.dome_y = rng.uniform([0.355, 0.10, 0.68], [0.41, 0.15, 0.76])
        self.dome_y += breath
        self.angle_v, self.taper, self.knob_u = rng.uniform([1.12, 0.86, 0.18], [1.24, 1.04, 0.26])
        # the cardiothoracic ratio: a heart is called enlarged above 0.5
        usual, enlarged, right = rng.uniform([0.40, 0.52, 0.6], [0.50, 0.62, 0.76])
        self.heart_u = np.array([right, 2 - right]) * (enlarged if enlarged_heart else usual)

    def points(self, side: int, uv: np.ndarray | list | tuple) -> np.ndarray:
        """Points (u, v) of one side, [..., 2], in unit coordinates."""
        return np.multiply(uv, [side * self.half_width, self.dome_y - self.apex_y]) + np.array([0.5, self.apex_y])

    def wall(self) -> np.ndarray:
        """The lung's lateral border from apex to costophrenic angle, (u, v) [N, 2]."""
        u = np.array([0.36, 0.54, 0.70, 0.82, 0.905, 0.97, 1.0, 0.985]) * np.linspace(self.taper, 1, 8)
        return spline(np.column_stack([u, [0, 0.04, 0.15, 0.31, 0.50, 0.74, 0.95, self.angle_v]]))

    def diaphragm(self, side: int) -> np.ndarray:
        """From the costophrenic angle to the midline, (u, v) [28, 2]."""
        u, top = np.linspace(0.985, 0, 28), 1.035 if side == LEFT else 1.0
        lateral, medial = np.clip((u - 0.46) / 0.525, 0, None), np.clip((0.46 - u) / 0.46, 0, None)
        return np.column_stack([u, top + (self.angle_v - top) * lateral**2.3 + 0.1 * medial**1.6])

    def lung(self, side: int) -> np.ndarray:
        """Outline (u, v) of a pleural cavity; heart and great vessels cover its medial part."""
        medial = [(0.0, 1.1), (0.13, 0.6), (0.13, 0.25), (0.18, 0.06), *(wall := self.wall())[[0, 6]]]
        return np.concatenate([spline(np.array(medial))[:-7], wall, self.diaphragm(side)])

    def heart(self, side: int) -> np.ndarray:
        """Border of the heart and the great vessels, from neck to abdomen, (u, v) [N, 2]."""
        h, k = self.heart_u[SIDES.index(side)], self.knob_u
        if side == RIGHT:
            knots = [(0.13, -0.8), (0.13, -0.2), (0.145, 0.1), (0.16, 0.25), (0.17, 0.42), (0.12 + 0.45 * h, 0.54)]
            knots += [(0.93 * h, 0.68), (h, 0.82), (0.95 * h, 0.98), (0.8 * h, 1.15)]
        else:
            knots = [(0.12, -0.8), (0.12, -0.2), (0.135, 0.1), (0.85 * k, 0.18), (k, 0.25), (0.95 * k, 0.31)]
            knots += [(0.195, 0.37), (0.23, 0.45), (0.1 + 0.42 * h, 0.56), (0.76 * h, 0.72), (0.94 * h, 0.86)]
            knots += [(h, 0.96), (0.97 * h, 1.06), (0.8 * h, 1.2)]
        return spline(np.array(knots))

    def between(self, border: Callable[[int], np.ndarray], top_v: float = -1.0) -> np.ndarray:
        """Outline in unit coordinates of what lies between a border's right and left course, below `top_v`."""
        right, left = (self.points(side, (uv := border(side))[uv[:, 1] > top_v]) for side in SIDES)
        return np.concatenate([right, left[::-1]])


class Canvas:
    """Draws shapes, turned and moved as the patient happens to stand, and sums up their attenuation."""

    SHIFT = 6  # fractional bits of the coordinates that OpenCV draws at
    MARGIN_PX, THINNEST_PX = 0.67, 1.7  # its antialiased fill exceeds a polygon by this much; what a mere line covers

    def __init__(self, size_px: int, rng: Rng) -> None:
        self.size_px, self.attenuation = size_px, np.zeros((size_px, size_px), np.float32)  # [S, S], 0 for air
        angle, scale, stretch = rng.uniform([-0.06, 0.9, 0.97], [0.06, 1.06, 1.03])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.linear, self.middle = turn * [scale * stretch, scale], 0.5 + rng.uniform(-0.03, 0.03, 2)

    def add(self, layer: np.ndarray, weight: float) -> None:
        """Add `weight` where the layer (uint8) is 255, and in proportion elsewhere."""
        self.attenuation += layer * np.float32(weight / 255)

    def soften(self, layer: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur in integer arithmetic, sigma in units of the image's side; a wide one on fewer pixels."""
        side_px = min(self.size_px, round(4 / sigma))
        small = cv2.resize(layer, (side_px, side_px), interpolation=cv2.INTER_LINEAR_EXACT)
        small = cv2.GaussianBlur(small, (0, 0), sigma * side_px)
        return cv2.resize(small, layer.shape, interpolation=cv2.INTER_LINEAR_EXACT)

    def fill(self, *outlines: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """The union of polygons [N, 2] as a layer, uint8 0..255."""
        layer = self._polygons(map(self._to_px, outlines), itertools.repeat(255))
        return self.soften(layer, soft) if soft else layer

    def stroke(self, lines: np.ndarray, widths: np.ndarray | float, values: np.ndarray | float = 255.0) -> np.ndarray:
        """Lines [L, P, 2] with widths [L, P] and values [L] as a layer, uint8; later lines cover earlier ones."""
        lines_px = self._to_px(lines)
        along = np.gradient(lines_px, axis=1)
        across = along[..., ::-1] * [-1, 1] / np.linalg.norm(along, axis=-1, keepdims=True).clip(1e-6)
        widths_px = np.broadcast_to(widths, lines.shape[:2])[..., None] * self.size_px
        half = np.maximum(widths_px / 2 - self.MARGIN_PX, 0) * across
        outlines = np.concatenate([lines_px + half, (lines_px - half)[:, ::-1]], axis=1)
        # what is thinner than the thinnest stroke gets fainter instead
        return self._polygons(outlines, values * np.minimum(widths_px.mean(axis=(1, 2)) / self.THINNEST_PX, 1))

    def _to_px(self, points: np.ndarray) -> np.ndarray:
        return ((points - [0.5, 0.5]) @ self.linear.T + self.middle) * self.size_px - 0.5

    def _polygons(self, outlines_px: Iterable[np.ndarray], values: Iterable[float]) -> np.ndarray:
        layer = np.zeros((self.size_px, self.size_px), np.uint8)
        for outline, value in zip(outlines_px, values, strict=False):
            fixed = np.rint(outline * 2**self.SHIFT).astype(np.int32)
            cv2.fillPoly(layer, [fixed], round(value), cv2.LINE_AA, self.SHIFT)
        return layer


def spline(knots: np.ndarray, num_per_knot: int = 6) -> np.ndarray:
    """Points [N, 2] of the uniform Catmull-Rom spline from the first knot to the last."""
    p, t = np.concatenate([knots[:1], knots, knots[-1:]]), (np.arange(num_per_knot) / num_per_knot)[:, None]
    p0, p1, p2, p3 = (p[i : len(p) - 3 + i, None] for i in range(4))
    curve = p1 + (t * (p2 - p0) + t**2 * (2 * p0 - 5 * p1 + 4 * p2 - p3) + t**3 * (3 * (p1 - p2) + p3 - p0)) / 2
    return np.concatenate([curve.reshape(-1, 2), knots[-1:]])


def mirrored(points: list | np.ndarray, y: float = 0.0) -> np.ndarray:
    """Points [P, 2] given as (distance from the midline, distance below y), on the right and on the left [2, P, 2]."""
    return np.stack([np.multiply(points, [side, 1]) + np.array([0.5, y]) for side in SIDES])


def ellipse(x: float, y: float, rx: float, ry: float, ripple: float = 0.0) -> np.ndarray:
    """Outline [40, 2] of an ellipse, lobulated where `ripple` says by how much of its radius."""
    t = np.arange(40) * np.pi / 20
    r = 1 + ripple * (np.sin(2 * t + 40 * ripple) + np.sin(3 * t))
    return np.column_stack([x + rx * r * np.cos(t), y + ry * r * np.sin(t)])


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two layers, uint8."""
    return (a.astype(np.uint16) * b // 255).astype(np.uint8)


def draw_body(canvas: Canvas, chest: Chest, rng: Rng) -> np.ndarray:
    """Add soft tissue; the shadow of heart and abdomen, uint8, is returned."""
    trunk = [(0.085, -0.4), (0.085, -0.14), (0.105, -0.08), (0.2, -0.05), (0.33, -0.025), (0.43, 0.0), (0.52, 0.08)]
    trunk += [(0.57, 0.2), (0.61, 0.43), (0.64, 0.68), (0.66, 1.2)]
    body = canvas.fill(*mirrored([(0, -0.4), *spline(np.array(trunk)), (0, 1.2)], chest.apex_y))
    skin_x, armpit_y = chest.half_width + rng.uniform(0.04, 0.11), rng.uniform(0.4, 1.6)
    wedges = mirrored([(skin_x, armpit_y), (skin_x + 0.01, armpit_y + 0.9), (skin_x + 0.07, armpit_y + 0.9)])
    body = cv2.subtract(body, canvas.fill(*wedges, soft=0.004))
    canvas.add(canvas.soften(body, 0.006), 0.55)
    canvas.add(canvas.soften(body, 0.05), 0.85)

    flank = mirrored([(skin_x, chest.dome_y + 0.1), (skin_x, 1.4)])
    abdomen = canvas.fill(np.concatenate([chest.between(chest.diaphragm), flank[1], flank[0, ::-1]]))
    canvas.add(cv2.min(canvas.soften(abdomen, 0.06), body), 0.45)
    stomach = ellipse(0.5 + rng.uniform(0.12, 0.2), chest.dome_y + 0.09, rng.uniform(0.04, 0.08), 0.03, 0.1)
    canvas.add(canvas.fill(stomach, soft=0.007), rng.choice([0, -0.2, -0.4]))
    size = rng.uniform(0.11, 0.17)
    breasts = mirrored(ellipse(0.66 * chest.half_width, chest.dome_y - 0.03, size, 0.9 * size))
    canvas.add(canvas.fill(*breasts, soft=0.008), chest.female * rng.uniform(0.04, 0.1))

    heart = canvas.fill(chest.between(chest.heart), soft=0.003)
    canvas.add(cv2.subtract(heart, canvas.soften(abdomen, 0.03)), 0.14)  # without an edge against the abdomen
    canvas.add(canvas.soften(heart, 0.03), 0.3)
    return cv2.max(heart, abdomen)


def draw_bones(canvas: Canvas, chest: Chest, shadow: np.ndarray, rng: Rng) -> None:
    """Add ribs and clavicles, fainter in `shadow` (uint8), scapulae, humeri and spine; take the trachea away."""
    t, number, slope = np.linspace(0, np.pi / 2, 18), np.arange(10)[:, None], rng.uniform(0.75, 1.2)
    top, drop = number * rng.uniform(0.1, 0.116) - 0.07, slope * (0.1 + 0.0125 * number)
    lateral = 0.005 + np.interp(top + drop, *chest.wall().T[::-1])
    posterior_v = top - 0.05 * np.sin(2 * t) + drop * (1 - np.cos(t))
    posterior = np.stack([0.07 + (lateral - 0.07) * np.sin(t), posterior_v], axis=-1)
    anterior = np.stack([0.3 + (lateral - 0.3) * np.cos(t), top + drop * (1 + 1.2 * np.sin(t) ** 1.2)], axis=-1)
    ribs = [np.concatenate([chest.points(side, arcs) for side in SIDES]) for arcs in (posterior, anterior[:7])]
    clavicle = np.array([(0.035, 0.12), (0.1, 0.105), (0.19, 0.08), (0.28, 0.05), (0.36, 0.035), (0.42, 0.045)])
    clavicles = mirrored(spline(clavicle - np.outer(np.arange(6), [0, rng.uniform(0, 0.012)])), chest.apex_y)
    girth = np.interp(np.arange(31), [0, 5, 15, 30], [0.034, 0.026, 0.02, 0.026])
    for lines, widths, weight in ((ribs[0], 0.028, 0.2), (ribs[1], 0.03, 0.13), (clavicles, girth, 0.24)):
        marrow = canvas.stroke(lines - [0, 0.002], np.multiply(widths, 0.6))
        bone = canvas.soften(cv2.subtract(canvas.stroke(lines, widths), marrow // 4), 0.002)
        canvas.add(cv2.subtract(bone, overlap(bone, shadow // 2)), weight * rng.uniform(0.6, 1.25))

    scapula = np.array([(0.31, 0.06), (0.42, 0.08), (0.44, 0.13), (0.4, 0.22), (0.36, 0.4), (0.33, 0.3), (0.31, 0.06)])
    humerus = np.array([(0.44, 0.08), (0.48, 0.05), (0.53, 0.1), (0.58, 0.7), (0.53, 0.7), (0.47, 0.2), (0.44, 0.08)])
    canvas.add(canvas.fill(*mirrored(spline(scapula), chest.apex_y), soft=0.006), 0.07)
    canvas.add(canvas.fill(*mirrored(spline(humerus), chest.apex_y), soft=0.007), 0.17)
    levels = np.arange(-0.05, 1.1, rng.uniform(0.05, 0.058))
    canvas.add(canvas.fill(np.array([(0.463, -0.3), (0.537, -0.3), (0.546, 1.3), (0.454, 1.3)]), soft=0.004), 0.13)
    canvas.add(canvas.fill(*(ellipse(0.5, y, 0.037, 0.025) for y in levels), soft=0.003), 0.06)
    trachea = canvas.stroke(np.array([[(0.5, -0.3), (0.5, 0.0), chest.points(LEFT, (0, 0.32))]]), 0.034)
    canvas.add(canvas.soften(trachea, 0.008), -0.3)


def draw_tissue(canvas: Canvas, chest: Chest, lungs: np.ndarray, rng: Rng, study: Rng) -> None:
    """Add hila, vessels and fine texture to the `lungs` (uint8)."""
    for grid, weight in ((20, 0.1), (60, 0.08), (160, 0.1)):
        clouds = np.frombuffer(study.bytes(grid * grid), np.uint8).reshape(grid, grid)
        clouds = cv2.resize(clouds, lungs.shape, interpolation=cv2.INTER_LINEAR_EXACT)
        canvas.add(overlap(canvas.soften(clouds, 0.2 / grid), cv2.max(lungs, 50)), weight)
    side, num_points, lines, widths = np.repeat(SIDES, 10), 9, [], []
    fan = np.tile(np.linspace(-1.35, 1.5, 10), 2) + rng.normal(0, 0.12, 20)
    hilum = chest.points(1, np.column_stack([0.21 * side, 0.47 - 0.04 * side]))
    start = hilum + rng.normal(0, 0.012, (20, 2)) + np.column_stack([0 * fan, 0.05 * np.sin(fan)])
    heading = np.where(side == LEFT, fan, np.pi - fan)
    length, width = rng.uniform(0.2, 0.34, 20), rng.uniform(0.005, 0.01, 20)
    for num_children in (3, 2, 0):  # thin branches are drawn first
        angles = heading[:, None] + rng.normal(0, 0.2, (len(start), num_points - 1)).cumsum(axis=1)
        steps = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * length[:, None, None] / (num_points - 1)
        lines.insert(0, np.concatenate([start[:, None], start[:, None] + steps.cumsum(axis=1)], axis=1))
        widths.insert(0, width[:, None] * np.linspace(1, 0.3, num_points))
        parent = np.repeat(np.arange(len(start)), num_children)
        joint = rng.integers(2, num_points - 1, len(parent))
        start, width = lines[0][parent, joint], 0.75 * widths[0][parent, joint]
        heading = angles[parent, joint - 1] + rng.choice([-1, 1], len(parent)) * rng.uniform(0.3, 0.8, len(parent))
        length = length[parent] * rng.uniform(0.4, 0.7, len(parent))
    widths = np.concatenate(widths)
    tree = canvas.stroke(np.concatenate(lines), widths, 255 * np.clip(widths.mean(axis=1) / 0.007, 0, 1))
    hila = canvas.fill(*(ellipse(x, y, 0.025, 0.06) for x, y in hilum[[0, -1]]), soft=0.016)
    canvas.add(overlap(cv2.max(canvas.soften(tree, 0.0015), hila // 3 * 2), lungs), 0.3)


def draw_finding(canvas: Canvas, chest: Chest, finding: str, air: np.ndarray, rng: Rng) -> list[np.ndarray]:
    """Add a finding to lungs filled with `air` (uint8); a layer (uint8) for each place that has it is returned."""
    if finding == "Cardiomegaly":  # its heart is part of the chest
        return [canvas.fill(chest.between(chest.heart, top_v=0.42))]
    side, wall = rng.choice(SIDES), chest.wall()
    if finding == "Effusion":  # fluid that climbs the chest wall
        level, climb = rng.uniform([0.88, 0.1], [1.12, 0.25])
        surface = [(u, level - climb * u**3) for u in np.linspace(0, 1.1, 20)]
        fluid = overlap(canvas.fill(chest.points(side, [*surface, (1.1, 1.4), (0, 1.4)]), soft=0.014), air)
        canvas.add(fluid, rng.uniform(0.3, 0.6))
        return [fluid]
    if finding == "Pneumothorax":  # air between the chest wall and a lung that has shrunk
        bottom, gap, dark, bright = rng.uniform([0.4, 0.07, 0.06, 0.1], [0.95, 0.28, 0.16, 0.35])
        lung = (upper := wall[wall[:, 1] < bottom]) + (1 - upper[:, 1:] / bottom) ** 0.8 * [-gap, 0.5 * gap]
        free = canvas.fill(chest.points(side, [(0, 0.5 * gap), *lung, (1.1, bottom), (1.1, -0.2), (0, -0.2)]))
        canvas.add(overlap(free, air), -dark)
        canvas.add(overlap(cv2.subtract(canvas.soften(free, 0.004), free), air), bright)  # the lung's edge
        return [overlap(free, air)]
    layers, is_mass = [], finding == "Mass"
    for _ in range(1 if is_mass else rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
        r = rng.uniform(0.045, 0.08) if is_mass else rng.uniform(0.015, 0.03)
        side, v, inset = rng.choice(SIDES), rng.uniform(0.15, 0.9), 1.2 * r / chest.half_width
        medial, lateral = np.interp(v, *chest.heart(side).T[::-1]) + inset, np.interp(v, *wall.T[::-1]) - inset
        x, y = chest.points(side, (rng.uniform(min(medial, lateral), lateral), v))
        layers.append(canvas.fill(ellipse(x, y, r, r * rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)), soft=0.2 * r))
        canvas.add(layers[-1], rng.uniform(0.2, 0.4) if is_mass else rng.uniform(0.3, 0.55))
    return layers


def expose(canvas: Canvas, rng: Rng) -> np.ndarray:
    """The film: uint8 grey [S, S], with an uneven beam, quantum noise and a random characteristic curve."""
    across, down = (rng.uniform(-0.08, 0.08, (2, 1)) * np.linspace(-1, 1, canvas.size_px)).astype(np.float32)
    threshold, width, gamma, black, white = rng.uniform([1.05, 0.36, 0.9, 0.0, 0.96], [1.4, 0.55, 1.3, 0.04, 1.0])
    quanta = np.frombuffer(rng.bytes(2 * canvas.size_px**2), np.uint8).reshape(2, *canvas.attenuation.shape)
    # at 1024 px about as strong as in ChestX-ray14, so that PNGs compress as well; larger pixels catch more light
    noise = (quanta[0].astype(np.float32) + quanta[1]) * np.float32(7e-5 * (canvas.size_px / 1024) ** 0.5)
    film = canvas.attenuation + noise + across + down[:, None]
    grey = (1 + np.exp((threshold - np.linspace(-1, 4, 4096)) / width)) ** -gamma
    table = np.rint(255 * np.clip((grey - black) / (white - black), 0, 1)).astype(np.uint8)
    return table[np.clip((film + 1) * np.float32(4096 / 5), 0, 4095).astype(np.uint16)]


def _rng(seed: int, index: int, *stream: int) -> Rng:
    return np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=stream))


def draw_phantom(seed: int, index: int, size_px: int, followup: int = 0, findings: set[str] | None = None) -> Phantom:
    """Draw radiograph `followup` of patient `index` (0 or more): a patient's share the anatomy, all else differs.

    `findings` replaces the random choice of what there is to see and leaves every other draw as it is.
    """
    patient, study = _rng(seed, index, PATIENT), _rng(seed, index, STUDY, followup)
    streams = {name: _rng(seed, index, FINDINGS + i, followup) for i, name in enumerate(FINDING_RATES)}
    drawn = {name for name, rng in streams.items() if rng.random() < FINDING_RATES[name]}
    streams = {name: rng for name, rng in streams.items() if name in (drawn if findings is None else findings)}
    oversampling = -(-MIN_CANVAS_PX // size_px)
    canvas = Canvas(oversampling * size_px, study)
    chest = Chest(patient, study.uniform(-0.035, 0.025), enlarged_heart="Cardiomegaly" in streams)
    shadow = draw_body(canvas, chest, patient)
    draw_bones(canvas, chest, shadow, patient)
    mask = cv2.subtract(canvas.fill(*(chest.points(side, chest.lung(side)) for side in SIDES)), shadow)
    lungs = canvas.soften(mask, 0.0025)
    air = overlap(lungs, 115 + canvas.soften(mask, 0.03) // 2)  # the lung is deeper away from its border
    canvas.add(air, -study.uniform(0.55, 0.75))
    marks = [(name, layer) for name in streams for layer in draw_finding(canvas, chest, name, air, streams[name])]
    emptied = [layer for name, layer in marks if name in ("Effusion", "Pneumothorax")]
    draw_tissue(canvas, chest, functools.reduce(cv2.subtract, emptied, lungs), patient, study)
    image = cv2.resize(expose(canvas, study), (size_px, size_px), interpolation=cv2.INTER_AREA)
    mask, boxes = cv2.resize(mask, (size_px, size_px), interpolation=cv2.INTER_AREA), []
    for name, layer in marks:
        x, y = (np.flatnonzero((layer > 12).any(axis=axis)) // oversampling for axis in (0, 1))
        boxes.append(Box(name, int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)))
    return Phantom(image, (mask > 127) * np.uint8(255), {name: int(name in streams) for name in FINDING_RATES}, boxes)


def _write_study(out: Path, size_px: int, seed: int, study: tuple[int, int]) -> tuple[str, str, str]:
    """Write one image and its mask; its name and its lines for the tables of entries and of boxes are returned."""
    patient, followup = study
    phantom, name = draw_phantom(seed, patient, size_px, followup), "{:08d}_{:03d}.png".format(*study)
    for path, pixels in ((out / "images" / name, phantom.image), (out / "masks" / name, phantom.lung_mask)):
        if not cv2.imwrite(str(path), pixels):
            raise UserError(f"{path}: could not be written; is the disk full?")
    labels = "|".join(finding for finding, present in phantom.labels.items() if present) or "No Finding"
    age, view = _rng(seed, patient, RECORD).integers(18, 90), _rng(seed, patient, RECORD, followup).choice(["PA", "AP"])
    gender = "F" if _rng(seed, patient, PATIENT).random() < FEMALE_RATE else "M"
    mm = f"{FIELD_MM / size_px:.4g}"
    entry = f"{name},{labels},{followup},{patient},{age},{gender},{view},{size_px},{size_px},{mm},{mm}\n"
    return name, entry, "".join(f"{name},{b.finding},{b.x},{b.y},{b.w},{b.h}\n" for b in phantom.boxes)


def write_phantoms(
    out: tyro.conf.Positional[Path],
    num_images: int = 200,
    size_px: int = 256,
    seed: int = 0,
    images_per_patient: tuple[int, int] = (1, 3),
    num_threads: int | None = None,
) -> None:
    """Write phantoms in ChestX-ray14's own layout (images/, two tables, two lists), and masks/ besides.

    Raises `UserError` for a folder in use and for numbers that cannot be.

    Args:
        out: Folder to write; empty, or not there yet.
        num_images: How many; the first ones are the same however many follow.
        size_px: Side of the images in pixels.
        seed: Another seed, other patients.
        images_per_patient: Fewest and most.
        num_threads: All cores if left out; the files are the same.
    """
    fewest, most = images_per_patient
    if num_images < 1 or size_px < MIN_SIZE_PX or seed < 0 or not 1 <= fewest <= most:
        raise UserError(f"phantoms: ask for 1 or more, also per patient, {MIN_SIZE_PX} px or more, and a seed >= 0")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new folder")
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    num_each = (_rng(seed, patient, VISITS).integers(fewest, most + 1) for patient in itertools.count(1))
    studies = ((patient, followup) for patient, num in enumerate(num_each, 1) for followup in range(num))
    studies = list(itertools.islice(studies, num_images))
    with ThreadPoolExecutor(max(num_threads or os.cpu_count() or 1, 1)) as pool:
        written = list(pool.map(functools.partial(_write_study, out, size_px, seed), studies))
    names, entries, boxes = zip(*written, strict=True)
    (out / "Data_Entry_2017.csv").write_text(ENTRY_HEADER + "".join(entries))
    (out / "BBox_List_2017.csv").write_text(BOX_HEADER + "".join(boxes))
    for file, is_test in (("train_val_list.txt", False), ("test_list.txt", True)):
        chosen = [name for name in names if (int(name[:8]) % TEST_STRIDE == 2) is is_test]
        (out / file).write_text("".join(f"{name}\n" for name in chosen))


if __name__ == "__main__":
    exits_on_user_error(lambda: tyro.cli(write_phantoms, prog="python -m pipeline.phantom"))()
