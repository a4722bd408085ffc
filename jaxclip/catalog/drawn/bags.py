"""Draws handbags and backpacks."""

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.item import DrawnItem
from jaxclip.catalog.drawn.outlines import ROUND, ellipse, path, rectangle, ribbon, rounded, symmetric
from jaxclip.catalog.drawn.palette import shaded


def handbag(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a tote, a satchel with a flap or a rounded hobo bag."""
    handle, metal = item.colours["handle"], item.colours["metal"]
    hobo = item.has("Hobo")
    reach, top = (330, -560) if hobo else (185, -470)
    arch = path([(-reach, -110), (-reach, top, 240), (reach, top, 240), (reach, -110)], 260)
    if not hobo:
        back = path(
            [(-reach + 44, -110), (-reach + 44, top + 66, 200), (reach - 44, top + 66, 200), (reach - 44, -110)], 220
        )
        canvas.detail([ribbon(back, 34)], shaded(handle.rgb, 70))
    canvas.part("handle", [ribbon(arch, 54)], handle, line=7)
    if item.has("Tote"):
        half = [(400, -150), (345, 400, 40), (0, 412, ROUND)]
    elif hobo:
        half = [(400, -150, 60), (480, 120, 240), (360, 400, 240), (0, 420, ROUND)]
    else:
        half = [(330, -150, 40), (440, 360, 60), (0, 372, ROUND)]
    shape = [(0, -100, ROUND) if hobo else (0, -160, 0), *half]
    body = canvas.part("body", [symmetric(shape, 30)], item.main, item.cloth)
    edge = shaded(item.main.rgb, 60)
    if item.has("Satchel"):
        flap = [(0, -165), (338, -160, 40), (370, 30, 100), (120, 120, 100), (0, 130, ROUND)]
        canvas.part("flap", [symmetric(flap)], item.main)
        canvas.part("clasp", [rectangle(-44, 84, 44, 160, 14)], metal, line=6)
    else:
        canvas.detail([ribbon(path([(-420, -96), (0, -84 if not hobo else -40), (420, -96)]), 9)], edge, 230, body)
    rings = [ribbon(ellipse(x, -110, 36, 36), 17, closed=True) for x in (-reach, reach)]
    canvas.part("rings", rings, metal, line=0)
    item.brand.sign(
        canvas, 0, 250 if item.has("Satchel") else 150, item.main.rgb, 112 if not item.has("Satchel") else 84
    )


def backpack(canvas: Canvas, item: DrawnItem) -> None:
    """Draws a backpack from the front, with one or two pockets of another colour."""
    pocket, strap = item.colours["pocket"], item.colours["straps"]
    for side, name in ((-1, "left"), (1, "right")):
        line = path([(side * 200, -420), (side * 500, -260, 200), (side * 470, 330, 200), (side * 300, 400)], 260)
        canvas.part(f"strap {name}", [ribbon(line, 66)], strap, line=7)
    canvas.part(
        "handle", [ribbon(path([(-80, -520), (-80, -660, 70), (80, -660, 70), (80, -520)], 80), 42)], strap, line=7
    )
    shell = [(0, -580, ROUND), (280, -580, 250), (370, -300, 200), (390, 400, 110), (330, 500, 90), (0, 510, ROUND)]
    body = canvas.part("body", [symmetric(shell)], item.main, item.cloth)
    seam = path([(-345, -60), (-300, -430, 200), (0, -470, ROUND), (300, -430, 200), (345, -60)], 240)
    canvas.detail([ribbon(seam, 15)], shaded(item.main.rgb, 56), 230, body)
    canvas.detail([rounded([(296, -300), (326, -290), (316, -200), (290, -205)], 6)], (206, 208, 212), within=body)
    if item.has("Two"):
        pockets = [rectangle(-290, -30, 290, 170, 50), rectangle(-310, 210, 310, 460, 60)]
    else:
        pockets = [rounded([(-290, 30), (290, 30), (310, 440), (-310, 440)], 60)]
    canvas.part("pocket", pockets, pocket)
    zips = [(270, 0, 1), (290, 250, 1)] if item.has("Two") else [(270, 90, 1)]
    canvas.detail([ribbon(path([(-x, y), (x, y)]), 13) for x, y, _ in zips], shaded(pocket.rgb, 58))
    tabs = [rounded([(x - 40, y - 8), (x - 8, y - 8), (x - 12, y + 66), (x - 36, y + 66)], 6) for x, y, _ in zips]
    canvas.detail(tabs, (206, 208, 212))
    place = (0, -240) if item.has("Two") else (0, -200)
    item.brand.sign(canvas, *place, item.main.rgb, 112)
