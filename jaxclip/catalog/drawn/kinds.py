"""The kinds of products in the drawn catalogue, with their variations and name templates."""

from jaxclip.catalog.drawn import accessories, bags, bottoms, footwear, tops
from jaxclip.catalog.drawn.item import Kind
from jaxclip.catalog.drawn.palette import CLOTH, DENIM, METAL, TRIM
from jaxclip.catalog.drawn.patterns import PATTERNS

_SMALL = ("Striped", "Checked", "Polka Dot", "Camouflage", "Floral")
_SLEEVES = ("", "Long Sleeve", "Sleeveless")
_CASUAL = ("Casual", "Casual", "Sports")
_DRESSY = ("Casual", "Formal", "Party")

KINDS = (
    Kind(("Apparel", "Topwear", "Tshirts"), "{cloth} {sleeves} {neck} T-shirt", tops.tshirt,
         {"sleeves": _SLEEVES, "neck": ("Round Neck", "V-Neck", "Polo")}, patterns=PATTERNS, usage=_CASUAL),
    Kind(("Apparel", "Topwear", "Shirts"), "{cloth} {sleeves} {pocket} Shirt with {buttons} Buttons", tops.shirt,
         {"sleeves": ("Short Sleeve", "Long Sleeve"), "pocket": ("", "Pocket")}, roles={"buttons": TRIM},
         patterns=("Striped", "Vertical Striped", "Checked", "Polka Dot", "Floral"), usage=("Casual", "Formal")),
    Kind(("Apparel", "Topwear", "Sweatshirts"), "{cloth} {hood} Sweatshirt {pocket}", tops.sweatshirt,
         {"hood": ("", "Hooded"), "pocket": ("", "with Pocket")}, patterns=PATTERNS, usage=_CASUAL),
    Kind(("Apparel", "Topwear", "Jackets"), "{cloth} {hood} Jacket with {contrast} {zip} Zip", tops.jacket,
         {"hood": ("", "Hooded"), "contrast": ("", "{sleeves} Sleeves and")}, roles={"sleeves": CLOTH, "zip": TRIM},
         patterns=("Colourblock", "Checked", "Camouflage", "Striped")),
    Kind(("Apparel", "Dress", "Dresses"), "{cloth} {sleeves} {neck} {length} Dress {belt_words}", tops.dress,
         {"sleeves": ("Sleeveless", "", "Long Sleeve"), "neck": ("Round Neck", "V-Neck"),
          "length": ("", "Mini", "Maxi"), "belt_words": ("", "with {belt} Belt")}, roles={"belt": CLOTH},
         patterns=("Striped", "Checked", "Polka Dot", "Floral", "Zigzag"), genders=("Women",), usage=_DRESSY),
    Kind(("Apparel", "Bottomwear", "Skirts"), "{cloth} {shape} Skirt {band_words}", bottoms.skirt,
         {"shape": ("A-Line", "Pencil", "Pleated", "Maxi"), "band_words": ("", "with {waistband} Waistband")},
         roles={"waistband": CLOTH}, patterns=("Striped", "Checked", "Polka Dot", "Floral", "Zigzag"),
         genders=("Women",)),
    Kind(("Apparel", "Bottomwear", "Jeans"), "{cloth} {finish} {fit} Jeans", bottoms.jeans,
         {"fit": ("Skinny", "Straight", "Bootcut"), "finish": ("", "Washed", "Torn")}, DENIM, {"thread": METAL}),
    Kind(("Apparel", "Bottomwear", "Trousers"), "{cloth} {length} {fit} Trousers {stripe_words}", bottoms.trousers,
         {"fit": ("Skinny", "Straight", "Wide"), "length": ("", "Cropped"),
          "stripe_words": ("", "with {stripe} Side Stripe")},
         roles={"stripe": CLOTH}, patterns=("Vertical Striped", "Checked", "Camouflage"), usage=("Casual", "Formal")),
    Kind(("Apparel", "Bottomwear", "Shorts"), "{cloth} {cargo} Shorts with {cord} Drawcord", bottoms.shorts,
         {"cargo": ("", "Cargo")}, roles={"cord": TRIM}, patterns=PATTERNS, usage=_CASUAL, size=130),
    Kind(("Accessories", "Bags", "Handbags"), "{cloth} {shape} with {handle} Handle", bags.handbag,
         {"shape": ("Tote Bag", "Satchel Handbag", "Hobo Bag")}, roles={"handle": TRIM, "metal": METAL},
         patterns=_SMALL, genders=("Women",)),
    Kind(("Accessories", "Bags", "Backpacks"), "{cloth} Backpack with {pockets}", bags.backpack,
         {"pockets": ("{pocket} Pocket", "Two {pocket} Pockets")}, roles={"pocket": CLOTH, "straps": CLOTH},
         patterns=_SMALL, genders=("Unisex",)),
    Kind(("Footwear", "Shoes", "Casual Shoes"), "{cloth} {height} {toe} Sneakers with {sole} Sole", footwear.sneaker,
         {"height": ("", "High-Top"), "toe": ("", "Toe Cap")}, roles={"sole": TRIM, "laces": TRIM}, patterns=_SMALL,
         genders=("Unisex",), usage=_CASUAL, mirrors=True),
    Kind(("Footwear", "Shoes", "Heels"), "{cloth} {strap} {shape} with {heel} Heel", footwear.heel,
         {"shape": ("Stilettos", "Block Heels", "Wedges"), "strap": ("", "Ankle Strap")},
         roles={"heel": TRIM, "buckle": METAL}, patterns=_SMALL, genders=("Women",), usage=_DRESSY, mirrors=True),
    Kind(("Footwear", "Shoes", "Booties"), "{cloth} {closing} {height} Boots with {sole} Sole", footwear.boot,
         {"height": ("Ankle", "Knee"), "closing": ("", "Lace-Up")}, roles={"sole": TRIM, "laces": TRIM}, mirrors=True),
    Kind(("Footwear", "Flip Flops", "Flip Flops"), "{cloth} Flip Flops with {strap} Straps", footwear.flip_flops,
         roles={"strap": TRIM}, patterns=PATTERNS, genders=("Unisex",)),
    Kind(("Accessories", "Watches", "Watches"), "{cloth} {band} Strap {dial} {shape} Dial {extra} Watch",
         accessories.watch, {"band": ("Leather", "Link", "Rubber"), "shape": ("", "Square"),
         "extra": ("", "Chronograph")}, roles={"dial": CLOTH, "case": METAL}),
    Kind(("Accessories", "Headwear", "Caps"), "{cloth} Cap with {brim} Brim", accessories.cap, roles={"brim": CLOTH},
         patterns=_SMALL, genders=("Unisex",), usage=_CASUAL, mirrors=True),
    Kind(("Accessories", "Eyewear", "Sunglasses"), "{cloth} Frame {lens} Lens {shape} Sunglasses",
         accessories.sunglasses,
         {"shape": ("Aviator", "Wayfarer", "Round", "Cat-Eye")}, roles={"lens": CLOTH}, genders=("Unisex",)),
    Kind(("Accessories", "Belts", "Belts"), "{cloth} {make} Belt with {buckle} {shape}", accessories.belt,
         {"make": ("", "Braided", "Studded"), "shape": ("Buckle", "Round Buckle")}, roles={"buckle": METAL},
         patterns=("Striped", "Checked", "Camouflage")),
    Kind(("Accessories", "Ties", "Ties"), "{cloth} {shape} {knot_words}", accessories.tie,
         {"shape": ("Tie", "Skinny Tie", "Bow Tie"), "knot_words": ("", "with {knot} Knot")}, roles={"knot": CLOTH},
         patterns=("Striped", "Checked", "Polka Dot", "Zigzag", "Floral"), genders=("Men",), usage=("Formal", "Party")),
)  # fmt: skip
