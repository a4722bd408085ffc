"""Draws T-shirts, shirts, sweatshirts, jackets and dresses."""

import numpy as np

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.item import DrawnItem
from jaxclip.catalog.drawn.outlines import ROUND, ellipse, mirrored, path, rectangle, ribbon, rounded, symmetric
from jaxclip.catalog.drawn.palette import PaletteColour, contrasting, shaded
from jaxclip.catalog.drawn.raster import Mask

_SHORT = [(180, -500), (310, -455, 60), (490, -235), (375, -160), (255, -260)]
_LONG = [(180, -500), (310, -455, 80), (440, -190, 300), (505, 330), (400, 352), (345, -60, 200), (250, -260)]


def tshirt(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a T-shirt, a polo or a sleeveless top."""
    _sleeves(canvas, item)
    _torso(canvas, item)
    if item.has("Polo"):
        _polo(canvas, item)
    else:
        _neck(canvas, item.main, "V-Neck" if item.has("V-Neck") else "Round Neck")
    canvas.detail([ribbon(path([(-270, 440), (0, 446), (270, 440)]), 7)], shaded(item.main.rgb, 80))
    item.brand.sign(canvas, 0, -150, item.main.rgb, 100)


def shirt(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a buttoned shirt with a collar."""
    _sleeves(canvas, item, cuffs=True)
    body = _torso(canvas, item, round_hem=True)
    edge = shaded(item.main.rgb, 70)
    canvas.detail([ribbon(path([(x, -420), (x, 540)]), 7) for x in (-28, 28)], edge, within=body)
    buttons = item.colours["buttons"]
    canvas.part("buttons", [ellipse(0, y, 17, 17) for y in range(-330, 440, 128)], buttons, line=5)
    _collar(canvas, item.main)
    if item.has("Pocket"):
        canvas.part("pocket", [rounded([(80, -190), (210, -190), (210, -50), (145, -20), (80, -50)], 8)], item.main)
    item.brand.sign(canvas, -145, -150, item.main.rgb, 74)


def sweatshirt(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a sweatshirt with ribbed cuffs and hem, with or without a hood."""
    if item.has("Hooded"):
        _hood(canvas, item.main)
    _sleeves(canvas, item, cuffs=True)
    _torso(canvas, item)
    hem = PaletteColour(item.main.name, shaded(item.main.rgb, 88))
    canvas.part("hem", [rounded([(-282, 405), (282, 405), (272, 482), (-272, 482)], 14)], hem)
    ribs = [ribbon(path([(x, 412), (x, 476)]), 5) for x in range(-250, 260, 31)]
    canvas.detail(ribs, shaded(item.main.rgb, 70), 150)
    _neck(canvas, item.main, "Round Neck")
    cord = contrasting(item.main.rgb, (245, 245, 240))
    if item.has("Hooded"):
        canvas.detail([ribbon(path([(s * 60, -400), (s * 75, -300), (s * 62, -215)]), 14) for s in (-1, 1)], cord)
    if item.has("Pocket"):
        pouch = rounded([(-120, 170), (120, 170), (190, 340), (180, 385), (-180, 385), (-190, 340)], 12)
        canvas.part("pocket", [pouch], item.main)
    item.brand.sign(canvas, 0, -95, item.main.rgb, 104)


def jacket(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a zipped jacket, whose sleeves may have another colour."""
    if item.has("Hooded"):
        _hood(canvas, item.main)
    _sleeves(canvas, item, cuffs=True, colour=item.colours["sleeves"] if item.has("Sleeves") else None)
    body = _torso(canvas, item)
    if not item.has("Hooded"):
        stand = rounded([(-125, -530), (125, -530), (140, -440), (0, -400), (-140, -440)], 22)
        canvas.part("collar", [stand], item.main)
    else:
        _neck(canvas, item.main, "V-Neck")
    canvas.detail([ribbon(path([(0, -440), (0, 480)]), 34)], shaded(item.main.rgb, 68), within=body)
    zipper = item.colours["zip"]
    canvas.part("zip", [rectangle(-9, -420, 9, 470), rounded([(-17, -330), (17, -330), (10, -270), (-10, -270)], 6)],
                zipper, line=0)  # fmt: skip
    slits = [ribbon(path([(s * 215, 150), (s * 165, 330)]), 15) for s in (-1, 1)]
    canvas.detail(slits, shaded(item.main.rgb, 55))
    item.brand.sign(canvas, -140, -160, item.main.rgb, 82)


def dress(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a dress: mini, knee-length or maxi, with or without a belt."""
    hem = 250 if item.has("Mini") else 690 if item.has("Maxi") else 470
    wide = 330 if item.has("Mini") else 400 if item.has("Maxi") else 375
    _sleeves(canvas, item, lift=100, squeeze=82)
    shoulder = [(96, -600), (150, -590)] if item.has("Sleeveless") else [(90, -600), (235, -570, 40)]
    half = [*shoulder, (212, -390, 60), (165, -130, 120), (wide, hem, 24), (0, hem + 22, ROUND)]
    body = canvas.part("body", [symmetric(half)], item.main, item.cloth)
    folds = [rounded([(s * 40, -100), (s * wide * 3 // 5, hem), (s * wide * 2 // 5, hem)], 4) for s in (-1, 1)]
    canvas.detail(
        [*folds, rounded([(0, -60), (26, hem + 10), (-26, hem + 10)], 4)], shaded(item.main.rgb, 60), 52, body
    )
    _neck(canvas, item.main, item.traits["neck"], top=-600, half=90)
    if item.has("Belt"):
        belt = item.colours["belt"]
        canvas.part("belt", [rounded([(-178, -155), (178, -155), (186, -92), (-186, -92)], 8)], belt)
    item.brand.sign(canvas, 0, -290, item.main.rgb, 70)


def _torso(canvas: Canvas, item: DrawnItem, round_hem: bool = False) -> Mask:
    waist = [(222, 60, 260)] if item.gender == "Women" else [(285, 60, 200)]
    shoulder = (262, -462, 30) if item.gender == "Women" else (300, -455, 30)
    hem = [(282, 440, 60), (150, 500, 200), (0, 520, ROUND)] if round_hem else [(284, 470), (0, 482, ROUND)]
    armhole = [(268, -250, 60)]
    if item.has("Sleeveless"):
        shoulder, armhole = (205, -480, 12), [(196, -310, 110), (272, -235, 24)]
    half = [(105, -505), shoulder, *armhole, *waist, *hem]
    body = canvas.part("body", [symmetric(half)], item.main, item.cloth)
    fold = shaded(item.main.rgb, 55)
    for side in (-1, 1):
        arm = rounded([(side * 262, -190), (side * 150, 10), (side * 235, -60)], 30)
        hip = rounded([(side * 240, 160), (side * 110, 300), (side * 250, 250)], 30)
        canvas.detail([arm, hip], fold, 34, body)
    return body


def _sleeves(
    canvas: Canvas,
    item: DrawnItem,
    cuffs: bool = False,
    colour: PaletteColour | None = None,
    lift: int = 0,
    squeeze: int = 100,
) -> None:
    kind = item.traits.get("sleeves", "Long Sleeve")
    if kind == "Sleeveless":
        return
    long = kind == "Long Sleeve"
    narrow = 36 if item.gender == "Women" and squeeze == 100 else 0
    points = [
        ((point[0] - narrow) * squeeze // 100, point[1] - lift, *point[2:]) for point in (_LONG if long else _SHORT)
    ]
    right = rounded(points)
    cuff = _cuff(long, narrow, squeeze, lift)
    for side, outline, end in (("left", mirrored(right), mirrored(cuff)), ("right", right, cuff)):
        canvas.part(f"sleeve {side}", [outline], colour or item.main, None if colour else item.cloth)
        if cuffs and long:
            canvas.part(f"cuff {side}", [end], colour or item.main)
        elif not long:
            hem = path([(472, -258), (362, -182)]) if side == "right" else path([(-472, -258), (-362, -182)])
            if not narrow and not lift:
                canvas.detail([ribbon(hem, 6)], shaded((colour or item.main).rgb, 80))


def _cuff(long: bool, narrow: int, squeeze: int, lift: int) -> np.ndarray:
    points = [(500, 270), (514, 350), (400, 372), (390, 292)]
    return rounded([((x - narrow) * squeeze // 100, y - lift) for x, y in points], 10)


def _neck(canvas: Canvas, colour: PaletteColour, kind: str, top: int = -505, half: int = 105) -> None:
    back = PaletteColour(colour.name, shaded(colour.rgb, 62))
    depth = 230 if kind == "V-Neck" else 125
    bend = 0 if kind == "V-Neck" else 90
    front = [(-half, top), (-half * 3 // 4, top + depth, bend), (half * 3 // 4, top + depth, bend), (half, top)]
    if kind == "V-Neck":
        front = [(-half, top), (0, top + depth, 6), (half, top)]
    canvas.part("neckline", [rounded([*front, (0, top + 40, 90)], 4)], back, line=0)
    canvas.detail([ribbon(path(front, 10 if kind == "V-Neck" else 90), 30)], shaded(colour.rgb, 84))
    canvas.detail([ribbon(path(front, 10 if kind == "V-Neck" else 90), 6)], shaded(colour.rgb, 66))
    canvas.detail([ribbon(path([(-half, top), (0, top + 40), (half, top)]), 24)], shaded(colour.rgb, 76))


def _collar(canvas: Canvas, colour: PaletteColour) -> None:
    back = PaletteColour(colour.name, shaded(colour.rgb, 60))
    canvas.part("neckline", [rounded([(-100, -510), (100, -510), (0, -400)], 20)], back, line=0)
    canvas.detail([ribbon(path([(-104, -514), (0, -488), (104, -514)]), 44)], shaded(colour.rgb, 80))
    flap = rounded([(104, -540), (140, -490), (96, -360), (4, -420), (60, -470)], 8)
    canvas.part("collar", [mirrored(flap), flap], colour)


def _polo(canvas: Canvas, item: DrawnItem) -> None:
    canvas.part("placket", [rectangle(-34, -440, 34, -250, 8)], item.main)
    dots = [ellipse(0, y, 11, 11) for y in (-370, -300)]
    canvas.detail(dots, contrasting(item.main.rgb, (245, 245, 240)))
    _collar(canvas, item.main)


def _hood(canvas: Canvas, colour: PaletteColour) -> None:
    outer = symmetric([(0, -690, ROUND), (150, -690, 140), (200, -500, 120), (130, -400, 40), (0, -380, 40)])
    canvas.part("hood", [outer], colour)
    inner = symmetric([(0, -640, ROUND), (98, -640, 90), (128, -500, 80), (80, -420, 40), (0, -400, 40)])
    canvas.detail([inner], shaded(colour.rgb, 58))
