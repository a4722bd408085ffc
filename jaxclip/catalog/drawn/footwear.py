"""Draws shoes from the side, toe to the right unless the canvas mirrors them, and flip flops from above."""

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.item import DrawnItem
from jaxclip.catalog.drawn.outlines import ROUND, ellipse, mirrored, path, rectangle, ribbon, rounded
from jaxclip.catalog.drawn.palette import PaletteColour, shaded


def sneaker(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a sneaker, low or high, with laces and a sole of another colour."""
    high = item.has("High-Top")
    top = -330 if high else -130
    upper = [(-455, top), (-300, top + 30, 90), (-140, top - 10 if high else top - 20, 60), (-30, -40, 140),
             (230, 70, 150),
             (470, 110, 120), (490, 250, 30), (-470, 250, 30), (-480, 40, 120)]  # fmt: skip
    body = canvas.part("upper", [rounded(upper, 40)], item.main, item.cloth)
    toe = [(290, 70, 90), (480, 100, 110), (500, 260, 20), (280, 260, 20), (240, 160, 60)]
    canvas.part("toe", [rounded(toe)], item.colours["sole"] if item.has("Toe Cap") else item.main)
    heel = rounded([(-520, top), (-400, top + 10), (-380, 260), (-520, 260)], 20)
    canvas.detail([heel], shaded(item.main.rgb, 70), 120, body)
    lining = rounded(
        [
            (-450, top - 4),
            (-300, top + 24, 80),
            (-145, top - 14),
            (-180, top + 42),
            (-300, top + 70, 80),
            (-430, top + 40),
        ]
    )
    canvas.detail([lining], shaded(item.main.rgb, 56))
    rows = 6 if high else 4
    lace = item.colours["laces"]
    steps = [(-130 + n * 84, top + 30 + n * 38) for n in range(rows)] if not high else [
        (-150 + n * 62, top + 50 + n * 62) for n in range(rows)
    ]  # fmt: skip
    canvas.part("laces", [ribbon(path([(x, y), (x - 84, y + 72)]), 25) for x, y in steps], lace, line=5)
    sole = [(-500, 225), (505, 225), (520, 290, 40), (470, 345, 40), (-460, 345, 40), (-512, 300, 40)]
    canvas.part("sole", [rounded(sole)], item.colours["sole"])
    canvas.detail([ribbon(path([(-495, 290), (510, 290)]), 8)], shaded(item.colours["sole"].rgb, 70))
    item.brand.sign(canvas, -215, 110, item.main.rgb, 92)


def heel(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a pump on a stiletto, a block heel or a wedge."""
    if item.has("Wedge"):
        support = [(-420, -60), (-120, 130, 200), (140, 290), (480, 330), (490, 372), (-400, 372)]
    elif item.has("Block"):
        support = [(-420, -20), (-230, 60), (-250, 372), (-410, 372)]
    else:
        support = [(-425, -40), (-285, 40, 60), (-372, 180, 160), (-380, 372), (-420, 372), (-432, 150, 200)]
    canvas.part("heel", [rounded(support, 8)], item.colours["heel"])
    lining = [
        (-440, -225, 30),
        (-320, -235, 60),
        (-110, -40, 200),
        (120, 110, 160),
        (290, 190, 40),
        (0, 200, 100),
        (-430, -100),
    ]
    canvas.detail([rounded(lining)], shaded(item.main.rgb, 56))
    shoe = [(-446, -215, 40), (-370, -205, 60), (-240, -50, 150), (-40, 110, 200), (130, 170, 120), (290, 140, 80),
            (420, 215, 120),
            (515, 315, 60), (500, 352, 20), (200, 352, 120), (-40, 262, 200), (-280, 80, 160),
                (-425, 50, 60)]  # fmt: skip
    canvas.part("upper", [rounded(shoe, 30)], item.main, item.cloth)
    sole = path([(-425, 58), (-280, 88, 160), (-40, 270, 200), (200, 362, 120), (490, 362)], 160)
    canvas.detail([ribbon(sole, 24)], shaded(item.colours["heel"].rgb, 78))
    if item.has("Ankle Strap"):
        loop = ribbon(ellipse(-325, -290, 125, 46), 40, closed=True)
        canvas.part(
            "strap", [loop, rounded([(-456, -290), (-410, -290), (-400, -160), (-446, -160)], 8)], item.main, line=0
        )
        canvas.detail([rectangle(-250, -300, -200, -226, 10)], item.colours["buckle"].rgb)
    item.brand.sign(canvas, 330, 275, item.main.rgb, 66)


def boot(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a boot, ankle-high or knee-high, with a higher heel for women."""
    top = -560 if item.has("Knee") else -230
    rise = 60 if item.gender == "Women" else 0
    leg = 36 if item.has("Knee") else 0
    upper = [(-330 - leg, top), (60 + leg, top), (40, -60, 150), (80, 110, 140), (330, 170, 140), (440, 290, 60),
             (430, 372, 20),
             (100, 372, 90), (-40, 350 - rise, 60), (-330, 350 - rise, 30), (-330, 0, 200)]  # fmt: skip
    body = canvas.part("shaft", [rounded(upper, 16)], item.main, item.cloth)
    heel_box = [(-335, 330 - rise), (-130, 340 - rise), (-150, 470), (-315, 470)]
    sole = item.colours["sole"]
    canvas.part("heel", [rounded(heel_box, 8)], sole)
    base = [(-340, 335 - rise), (-60, 340 - rise, 60), (90, 376, 80), (445, 366), (448, 410, 20), (80, 424, 80),
            (-80, 384 - rise, 60),
            (-336, 376 - rise)]  # fmt: skip
    canvas.part("sole", [rounded(base, 10)], sole)
    dark = shaded(item.main.rgb, 58)
    canvas.detail(
        [rounded([(-10, 60), (110, 90), (60, 150)], 30), rounded([(-320, 60), (-200, 110), (-310, 130)], 30)],
        dark,
        80,
        body,
    )
    if item.has("Lace-Up"):
        rows = range(-180 if top > -400 else -480, 90, 66)
        laces = [ribbon(path([(58 + max(y + 40, 0) // 3, y), (-50, y + 34)]), 22) for y in rows]
        canvas.part("laces", laces, item.colours["laces"], line=5)
    else:
        gusset = rounded([(-170, -150), (-90, -150), (-110, 60), (-150, 60)], 10)
        canvas.detail([gusset], dark, 230)
        canvas.detail(
            [ribbon(path([(x, -140), (x + 2, 50)]), 5) for x in (-148, -130, -112)], shaded(item.main.rgb, 90)
        )
    canvas.detail([ribbon(path([(-330 - leg, top + 30), (60 + leg, top + 30)]), 12)], dark, 220, body)
    item.brand.sign(canvas, -215, 200 - rise // 2, item.main.rgb, 84)


def flip_flops(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a pair of flip flops from above."""
    sole = [(0, -500, 200), (170, -480, 200), (215, -250, 250), (150, 60, 300), (165, 330, 200), (60, 500, 200),
            (-90, 490, 200),
            (-135, 300, 250), (-110, 0, 300), (-165, -250, 300), (-130, -480, 200)]  # fmt: skip
    rim = PaletteColour(item.main.name, shaded(item.main.rgb, 70))
    for side in (-1, 1):
        outline = rounded([(x + 245, y) for x, y, _ in sole], ROUND)
        inner = rounded([(x * 86 // 100 + 245, y * 93 // 100) for x, y, _ in sole], ROUND)
        straps = [path([(275, -300), (395, -180), (410, 70)], 200), path([(275, -300), (160, -180), (130, 70)], 200)]
        ribbons = [ribbon(strap, 54) for strap in straps]
        if side < 0:
            outline, inner, ribbons = mirrored(outline), mirrored(inner), [mirrored(strap) for strap in ribbons]
        place = "left" if side < 0 else "right"
        canvas.part(f"rim {place}", [outline], rim)
        canvas.part(f"sole {place}", [inner], item.main, item.cloth, line=4)
        canvas.part(f"strap {place}", [*ribbons, ellipse(side * 275, -300, 34, 34)], item.colours["strap"], line=7)
        item.brand.sign(canvas, side * 255, 290, item.main.rgb, 88, f"emblem {place}")
