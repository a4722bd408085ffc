import { $, displayName, make } from "./elements.js";

// Fills the dialog with the details of a product.
export function fillDialog(product) {
  $("name").textContent = product.caption || product.id;
  $("category").textContent = product.category;
  $("others").textContent = product.captions.slice(1).join("\n");
  $("large").onload = () => {
    const ratio = $("large").naturalWidth / $("large").naturalHeight;
    $("shot").style.aspectRatio = ratio;
    $("shot").style.width = `min(${26 * ratio}rem, ${56 * ratio}vh)`;
  };
  $("large").src = product.image.slice(1);
  $("large").alt = product.caption || product.id;
  $("crop").hidden = $("cropped").hidden = !product.crop || !product.colours.length;
  if (product.crop) {
    const [left, top, right, bottom] = product.crop.map((share) => 100 * share);
    Object.assign($("crop").style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
  }
  $("colours").hidden = !product.colours.length;
  const [band, list] = $("colours").children;
  band.replaceChildren(...product.colours.map((colour) => {
    const part = make("span");
    Object.assign(part.style, { background: colour.rgb, flex: colour.share });
    return part;
  }));
  list.replaceChildren(...product.colours.map((colour) => {
    const dot = make("i");
    dot.style.background = colour.rgb;
    const share = make("small", { textContent: `${Math.round(100 * colour.share)}%` });
    return make("li", {}, dot, colour.name, share);
  }));
  const rows = [...Object.entries(product.attributes), ["id", product.id]];
  $("attributes").replaceChildren(...rows.flatMap(([name, value]) => [
    make("dt", { textContent: displayName(name) }), make("dd", { textContent: value }),
  ]));
}
