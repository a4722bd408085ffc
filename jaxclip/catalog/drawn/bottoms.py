"""Draws jeans, trousers, shorts and skirts."""

import numpy as np

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.item import DrawnItem
from jaxclip.catalog.drawn.outlines import ROUND, ellipse, mirrored, path, rectangle, ribbon, rounded, symmetric
from jaxclip.catalog.drawn.palette import RGB, PaletteColour, shaded
from jaxclip.catalog.drawn.raster import Mask


def jeans(canvas: Canvas, item: DrawnItem) -> None:
    """Draws jeans with seams, pockets and a button; washed or torn if the item says so."""
    legs = _legs(canvas, item, bottom=640)
    seam = _thread(item.main)
    for side in (-1, 1):
        outer = path([(side * 236, -500), (side * 268, -200, 300), (side * 236, 630)], 300)
        canvas.detail([ribbon(outer, 6)], seam, 170, legs[(side + 1) // 2])
        canvas.detail([ribbon(path([(side * 110, -555), (side * 140, -450), (side * 250, -430)]), 10)], seam)
        if item.has("Washed"):
            for size, strength in ((100, 50), (70, 70), (42, 70)):
                faded = ellipse(side * 150, -60, 72 * size // 100, 270 * size // 100)
                canvas.detail([faded], shaded(item.main.rgb, 160), strength, legs[(side + 1) // 2])
        if item.has("Torn"):
            tears = [rounded([(side * 90, y), (side * 150, y - 20), (side * 215, y), (side * 150, y + 22)], 8)
                     for y in (70, 130, -170)]  # fmt: skip
            canvas.detail(tears, shaded(item.main.rgb, 185), 230, legs[(side + 1) // 2])
    _waist(canvas, item.main, loops=True)
    canvas.detail([ellipse(0, -590, 15, 15)], item.colours["thread"].rgb)
    item.brand.sign(canvas, 150, -350, item.main.rgb, 78)


def trousers(canvas: Canvas, item: DrawnItem) -> None:
    """Draws trousers with a crease, or track pants with a stripe down each side."""
    legs = _legs(canvas, item, bottom=430 if item.has("Cropped") else 640)
    for side in (-1, 1):
        leg = legs[(side + 1) // 2]
        if item.has("Stripe"):
            name = f"stripe {'left' if side < 0 else 'right'}"
            canvas.part(name, [_side_stripe(item, side)], item.colours["stripe"], within=leg, line=0)
        else:
            canvas.detail(
                [ribbon(path([(side * 140, -430), (side * 165, 640)]), 7)], shaded(item.main.rgb, 66), 190, leg
            )
        canvas.detail([ribbon(path([(side * 170, -555), (side * 222, -400)]), 9)], shaded(item.main.rgb, 62))
    _waist(canvas, item.main, loops=not item.has("Stripe"))
    if item.has("Stripe"):
        cords = [ribbon(path([(s * 8, -590), (s * 34, -520), (s * 26, -440)]), 13) for s in (-1, 1)]
        canvas.part("cord", cords, item.colours["stripe"], line=0)
    item.brand.sign(canvas, 130, -330, item.main.rgb, 78)


def shorts(canvas: Canvas, item: DrawnItem) -> None:
    """Draws shorts, with cargo pockets if the item says so."""
    _legs(canvas, item, bottom=290 if item.gender == "Men" else 140, short=True)
    for side in (-1, 1):
        canvas.detail([ribbon(path([(side * 165, -225), (side * 240, -90)]), 9)], shaded(item.main.rgb, 62))
        if item.has("Cargo"):
            x, y = side * 245, 15 if item.gender == "Men" else -65
            name = f"pocket {'left' if side < 0 else 'right'}"
            flap = [(x - 92, y - 15), (x + 92, y - 15), (x + 92, y + 35), (x, y + 65), (x - 92, y + 35)]
            canvas.part(name, [rectangle(x - 85, y, x + 85, y + 175, 14)], item.main)
            canvas.part(name, [rounded(flap, 8)], item.main)
    _waist(canvas, item.main, top=-290, loops=item.has("Cargo"))
    cords = [ribbon(path([(s * 8, -255), (s * 36, -190), (s * 26, -115)]), 14) for s in (-1, 1)]
    canvas.part("cord", cords, item.colours["cord"], line=0)
    item.brand.sign(canvas, -150, -60, item.main.rgb, 84)


def skirt(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a skirt: A-line, pencil, pleated or maxi."""
    hem = 560 if item.has("Maxi") else 330 if item.has("Pencil") else 250
    wide = 235 if item.has("Pencil") else 440 if item.has("Maxi") else 430
    half = [(165, -460), (250, -250, 220), (wide, hem, 24), (0, hem + 34, ROUND)]
    body = canvas.part("body", [symmetric(half)], item.main, item.cloth)
    dark = shaded(item.main.rgb, 58)
    if item.has("Pleated"):
        lines = [ribbon(path([(x * 14, -430), (x * 26, -150), (x * 37, hem + 40)]), 10) for x in range(-10, 11, 2)]
        canvas.detail(lines, dark, 150, body)
        shades = [rounded([(x * 14, -430), (x * 37, hem + 40), ((x + 1) * 37, hem + 40)], 2) for x in range(-10, 10, 2)]
        canvas.detail(shades, dark, 60, body)
    elif item.has("Pencil"):
        canvas.detail([ribbon(path([(0, 130), (0, hem + 40)]), 10)], dark, 220, body)
    else:
        folds = [rounded([(x // 3, -300), (x - 20, hem + 40), (x + 40, hem + 40)], 4) for x in (-260, -90, 80, 240)]
        canvas.detail(folds, dark, 60, body)
    band = (
        item.colours["waistband"] if item.has("Waistband") else PaletteColour(item.main.name, shaded(item.main.rgb, 90))
    )
    canvas.part("waistband", [rounded([(-168, -510), (168, -510), (180, -430), (-180, -430)], 10)], band)
    item.brand.sign(canvas, 0, 40 if item.has("Pencil") else 90, item.main.rgb, 92)


def _thread(main: PaletteColour) -> RGB:
    return shaded(main.rgb, 55 if sum(main.rgb) > 330 else 150)


def _side_stripe(item: DrawnItem, side: int) -> np.ndarray:
    hip, knee, ankle = _leg_edge(item)
    return ribbon(
        path([(side * 210, -620), (side * hip, -360, 200), (side * knee, 60, 260), (side * ankle, 650)], 260), 110
    )


def _leg_edge(item: DrawnItem) -> tuple[int, int, int]:
    hip = 297 if item.gender == "Women" else 282
    if item.has("Skinny"):
        return hip, 212, 190
    if item.has("Bootcut"):
        return hip, 212, 335
    return (hip, 262, 335) if item.has("Wide") else (hip, 262, 245)


def _legs(canvas: Canvas, item: DrawnItem, bottom: int, short: bool = False) -> tuple[Mask, Mask]:
    top = -290 if short else -620
    crotch = top + 330
    if short:
        hip = 285 if item.gender == "Women" else 270
        points = [(0, top), (215, top), (hip, top + 180, 150), (hip + 95, bottom), (60, bottom + 34), (0, crotch)]
    else:
        hip, knee, ankle = _leg_edge(item)
        points = [(0, top), (200, top), (hip, top + 260, 200), (knee, 60, 260), (ankle, bottom), (84, bottom + 12),
                  (86, 40, 200), (0, crotch)]  # fmt: skip
    right = rounded(points, 12)
    left_mask = canvas.part("leg left", [mirrored(right)], item.main, item.cloth)
    right_mask = canvas.part("leg right", [right], item.main, item.cloth)
    fly = path([(0, top + 60), (4, crotch)])
    dark = shaded(item.main.rgb, 60)
    canvas.detail([ribbon(fly, 9)], dark)
    creases = [rounded([(s * 10, crotch), (s * 150, crotch + 10), (s * 20, crotch + 60)], 10) for s in (-1, 1)]
    canvas.detail(creases[:1], dark, 60, left_mask)
    canvas.detail(creases[1:], dark, 60, right_mask)
    return left_mask, right_mask


def _waist(canvas: Canvas, colour: PaletteColour, top: int = -620, loops: bool = True) -> None:
    back = PaletteColour(colour.name, shaded(colour.rgb, 60))
    canvas.part("lining", [ellipse(0, top - 2, 198, 22)], back, line=5)
    band = [
        (-206, top - 4),
        (0, top + 26, ROUND),
        (206, top - 4),
        (214, top + 66),
        (0, top + 86, ROUND),
        (-214, top + 66),
    ]
    canvas.part("waistband", [rounded(band, 8)], PaletteColour(colour.name, shaded(colour.rgb, 92)))
    if loops:
        straps = [rectangle(x - 11, top, x + 11, top + 88, 5) for x in (-150, -70, 70, 150)]
        canvas.detail(straps, shaded(colour.rgb, 74))
