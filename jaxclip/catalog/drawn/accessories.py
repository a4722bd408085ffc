"""Draws watches, caps, sunglasses, belts and ties."""

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.item import DrawnItem
from jaxclip.catalog.drawn.outlines import ROUND, ellipse, mirrored, path, placed, rectangle, ribbon, rounded, symmetric
from jaxclip.catalog.drawn.palette import INK, WHITE, PaletteColour, contrasting, shaded

_MARKS = ((0, -100), (50, -87), (87, -50), (100, 0), (87, 50), (50, 87), (0, 100), (-50, 87), (-87, 50), (-100, 0),
          (-87, -50), (-50, -87))  # fmt: skip


def watch(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a watch; its strap and its dial differ in colour."""
    small = item.gender == "Women"
    radius, half = (190, 84) if small else (250, 128)
    strap, dial, case = item.main, item.colours["dial"], item.colours["case"]
    for name, sign in (("strap top", -1), ("strap bottom", 1)):
        band = [
            (-half, 0),
            (half, 0),
            (half * 3 // 4, sign * 660),
            (0, sign * 690, ROUND),
            (-half * 3 // 4, sign * 660),
        ]
        mask = canvas.part(name, [rounded(band, 26)], strap)
        if item.has("Leather"):
            seams = [ribbon(path([(x * (half - 20), 0), (x * (half * 3 // 4 - 20), sign * 650)]), 7) for x in (-1, 1)]
            canvas.detail(seams, shaded(strap.rgb, 165 if sum(strap.rgb) < 400 else 66), 220, mask)
        elif item.has("Link"):
            links = [ribbon(path([(-half, sign * y), (half, sign * y)]), 10) for y in range(radius, 680, 62)]
            rows = [ribbon(path([(x * half // 3, 0), (x * half // 4, sign * 680)]), 8) for x in (-1, 1)]
            canvas.detail([*links, *rows], shaded(strap.rgb, 56), 220, mask)
        else:
            holes = [ellipse(0, sign * y, 15, 12) for y in range(radius + 90, 660, 72)]
            canvas.detail(holes, shaded(strap.rgb, 50), within=mask)
    canvas.part("crown", [rectangle(radius, -34, radius + 46, 34, 12)], case, line=6)
    if item.has("Square"):
        face, glass = (
            rectangle(-radius, -radius, radius, radius, 60),
            rectangle(48 - radius, 48 - radius, radius - 48, radius - 48, 36),
        )
    else:
        face, glass = ellipse(0, 0, radius, radius), ellipse(0, 0, radius - 46, radius - 46)
    canvas.part("case", [face], case)
    canvas.part("dial", [glass], dial, line=6)
    ink = contrasting(dial.rgb, WHITE, INK)
    reach = radius * 64 // 100
    canvas.detail([ellipse(x * reach // 100, y * reach // 100, 11, 11) for x, y in _MARKS], ink)
    if item.has("Chronograph"):
        dials = [
            ellipse(x * radius // 250, y * radius // 250, radius * 46 // 250, radius * 46 // 250)
            for x, y in ((-88, 10), (88, 10))
        ]
        canvas.detail([ribbon(dial, 10, closed=True) for dial in dials], ink)
    hands = [
        ribbon(path([(0, 10), (-radius * 28 // 100, -radius * 26 // 100)]), 18),
        ribbon(path([(0, 10), (radius * 36 // 100, -radius * 40 // 100)]), 13),
    ]
    canvas.detail([*hands, ellipse(0, 0, 18, 18)], ink)
    item.brand.sign(canvas, 0, radius * 36 // 100, dial.rgb, radius * 25 // 100)


def cap(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a cap with its brim to the right, unless the canvas mirrors it."""
    brim = item.colours["brim"]
    crown = [
        (-400, 130, 60),
        (-410, -200, 250),
        (-180, -370, 250),
        (150, -370, 250),
        (330, -200, 250),
        (340, 130, 60),
        (0, 160, ROUND),
    ]
    mask = canvas.part("crown", [rounded(crown, 60)], item.main, item.cloth)
    edge = shaded(item.main.rgb, 60)
    panels = [path([(-20, -350), (-190, -150), (-200, 150)], 300), path([(-20, -350), (210, -180), (215, 150)], 300)]
    canvas.detail([ribbon(panel, 8) for panel in panels], edge, 220, mask)
    visor = [(-150, 120, 60), (120, 70, 200), (340, 60, 120), (560, 190, 120), (570, 240, 40), (330, 190, 200),
             (80, 190, 200),
             (-140, 190, 60)]  # fmt: skip
    canvas.part("brim", [rounded(visor, 40)], brim)
    canvas.detail(
        [ribbon(path([(-120, 165), (120, 130, 200), (330, 125, 150), (540, 215)], 200), 7)], shaded(brim.rgb, 66)
    )
    canvas.part("button", [ellipse(-20, -352, 40, 24)], brim, line=6)
    item.brand.sign(canvas, 10, -95, item.main.rgb, 118)


def sunglasses(canvas: Canvas, item: DrawnItem) -> None:
    """Draws sunglasses from the front: aviator, wayfarer, round or cat-eye."""
    frame, lens = item.main, item.colours["lens"]
    if item.has("Aviator"):
        shape = [(70, -120, 60), (440, -130, 90), (470, 40, 200), (330, 190, 200), (170, 180, 200), (70, 20, 150)]
        width = 28
    elif item.has("Round"):
        shape, width = None, 34
    elif item.has("Cat-Eye"):
        shape, width = (
            [(60, -70, 60), (300, -150, 60), (530, -210, 24), (450, 100, 200), (260, 150, 200), (80, 90, 150)],
            62,
        )
    else:
        shape, width = (
            [(60, -125, 40), (490, -145, 40), (450, 110, 120), (330, 145, 100), (150, 140, 100), (80, 80, 100)],
            66,
        )
    right = ellipse(275, 0, 200, 195) if shape is None else rounded(shape, 60)
    bridge = path([(-90, -60), (0, -105), (90, -60)], 200)
    arms = [rounded([(s * 440, -110), (s * 560, -130), (s * 585, -60), (s * 560, 60), (s * 535, 50), (s * 545, -60),
            (s * 450, -60)], 20)
            for s in (-1, 1)]  # fmt: skip
    canvas.part("arms", arms, PaletteColour(frame.name, shaded(frame.rgb, 85)), line=6)
    for name, outline in (("lens left", mirrored(right)), ("lens right", right)):
        glass = canvas.part(name, [outline], lens, line=0)
        x = 150 if name == "lens right" else -390
        canvas.detail([rounded([(x, -150), (x + 70, -150), (x - 20, 200), (x - 90, 200)], 4)], WHITE, 70, glass)
    rims = [ribbon(outline, width, closed=True) for outline in (right, mirrored(right))]
    extra = [ribbon(path([(-90, -125), (90, -125)]), 24)] if item.has("Aviator") else []
    canvas.part("frame", [*rims, ribbon(bridge, 36), *extra], frame, line=0)
    item.brand.sign(canvas, 290, 20, lens.rgb, 78)


def belt(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a rolled belt with its buckle in front."""
    half = 62 if item.gender == "Women" else 96
    metal = item.colours["buckle"]
    back = PaletteColour(item.main.name, shaded(item.main.rgb, 64))
    canvas.part("lining", [ribbon(ellipse(0, -150, 410, 190), half * 2, closed=True)], back)
    front = path([(-440, -160), (-440, 80, 260), (0, 120, ROUND), (440, 80, 260), (440, -160)], 360)
    strap = canvas.part("strap", [ribbon(front, half * 2)], item.main, item.cloth)
    if item.has("Braided"):
        weave = [ribbon(path([(x, -200), (x + s * 150, 260)]), 14) for x in range(-600, 620, 70) for s in (-1, 1)]
        canvas.detail(weave, shaded(item.main.rgb, 58), 190, strap)
    elif item.has("Studded"):
        for side in (-1, 1):
            spots = [(side * x, y) for x, y in ((180, 98), (250, 88), (318, 64), (378, 20), (420, -50))]
            canvas.detail([ellipse(x, y, 24, 24) for x, y in spots], metal.rgb)
            canvas.detail([ellipse(x - 6, y - 6, 9, 9) for x, y in spots], WHITE)
    else:
        for shift in (-half + 22, half - 22):
            seam = path([(-440 - shift, -160), (-440 - shift, 80 + shift, 260), (0, 120 + shift, ROUND),
                         (440 + shift, 80 + shift, 260), (440 + shift, -160)], 360)  # fmt: skip
            canvas.detail([ribbon(seam, 8)], shaded(item.main.rgb, 150 if sum(item.main.rgb) < 420 else 70), 200, strap)
    size = half + 46
    plate = (
        ellipse(0, 105, size + 20, size)
        if item.has("Round Buckle")
        else rectangle(-size - 14, 105 - size, size + 14, 105 + size, 26)
    )
    canvas.part("buckle", [plate], metal)
    item.brand.sign(canvas, 0, 105, metal.rgb, size * 62 // 100)


def tie(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a tie, or a bow tie."""
    if item.has("Bow"):
        wing = rounded(
            [(40, -40, 40), (300, -210, 90), (450, -170, 60), (450, 170, 60), (300, 210, 90), (40, 40, 40)], 40
        )
        canvas.part("wings", [wing, mirrored(wing)], item.main, item.cloth)
        folds = rounded([(60, -10), (280, -60), (280, -20)], 10)
        canvas.detail([folds, mirrored(folds), placed(folds, 0, 80)], shaded(item.main.rgb, 58), 90)
        canvas.part("knot", [rectangle(-80, -90, 80, 90, 34)], item.colours["knot"] if item.has("Knot") else item.main)
        item.brand.sign(canvas, 0, 0, (item.colours["knot"] if item.has("Knot") else item.main).rgb, 58)
        return
    wide = 112 if item.has("Skinny") else 176
    blade = symmetric([(64, -480), (wide, 480), (0, 640)], 14)
    canvas.part("blade", [blade], item.main, item.cloth)
    knot = symmetric([(118, -640), (74, -470), (0, -462)], 18)
    canvas.part("knot", [knot], item.colours["knot"] if item.has("Knot") else item.main)
    canvas.detail([rounded([(-30, -440), (16, -440), (-4, -180)], 6)], shaded(item.main.rgb, 55), 80)
    item.brand.sign(canvas, 0, 380, item.main.rgb, 78)
