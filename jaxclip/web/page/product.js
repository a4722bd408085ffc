import { $, displayName, make } from "./elements.js";

// Shows one of a product's pictures large; the crop is of the main picture.
function showPicture(product, number) {
  $("large").src = product.images[number].slice(1);
  $("crop").hidden = $("cropped").hidden = number > 0 || !product.crop || !product.colours.length;
  [...$("thumbnails").children].forEach((button, index) => button.setAttribute("aria-pressed", index === number));
}

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
  $("large").alt = product.caption || product.id;
  showPicture(product, 0);
  const several = product.images.length > 1 ? product.images : [];
  $("thumbnails").replaceChildren(...several.map((path, number) => {
    const small = `${path.slice(1)}${path.includes("?") ? "&" : "?"}size=64`;
    const button = make("button", { type: "button" }, make("img", { src: small, alt: "" }));
    button.setAttribute("aria-label", `Picture ${number + 1} of ${several.length}`);
    button.setAttribute("aria-pressed", number === 0);
    button.onclick = () => showPicture(product, number);
    return button;
  }));
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
