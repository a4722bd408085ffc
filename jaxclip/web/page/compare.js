import { $, make, moveBadge } from "./elements.js";

const SVG = "http://www.w3.org/2000/svg";

// Shows the top products of both stages in two columns, with a curve between the two places of a product.
export function compare(first, second, count, open) {
  if (!second.length) {
    $("compare").replaceChildren();
    return;
  }
  const places = new Map(second.map((result, place) => [result.id, place]));
  const top = first.slice(0, count);
  const left = top.map((result, before) => {
    const place = places.get(result.id) ?? second.length;
    const item = entry(result, before, moveBadge(place + 1, before + 1, "after re-ranking", place + 1), open);
    if (place >= count) item.firstChild.classList.add("gone");
    return item;
  });
  const right = second.slice(0, count).map((result, place) => {
    const item = entry(result, place, moveBadge(place + 1, result.before), open);
    if (result.before <= count) item.className = direction(result.before - 1, place);
    return item;
  });
  const curves = document.createElementNS(SVG, "svg");
  curves.setAttribute("viewBox", `0 0 100 ${top.length}`);
  curves.setAttribute("preserveAspectRatio", "none");
  curves.setAttribute("aria-hidden", "true");
  top.forEach((result, before) => {
    const place = places.get(result.id) ?? second.length;
    if (place < count) curves.append(curve(result.id, before, place));
  });
  const column = (title, items) => make("section", {}, make("h2", { textContent: title }), make("ol", {}, ...items));
  $("compare").replaceChildren(column("First stage", left), make("div", { className: "curves" }, curves), column("Re-ranked", right));
}

const direction = (before, place) => (place < before ? "up" : place > before ? "down" : "same");

function curve(id, before, place) {
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", `M0 ${before + 0.5} C50 ${before + 0.5} 50 ${place + 0.5} 100 ${place + 0.5}`);
  path.setAttribute("class", direction(before, place));
  path.dataset.id = id;
  return path;
}

function entry(result, place, badge, open) {
  const title = result.caption || result.category || result.id;
  const image = make("img", { src: `${result.image.slice(1)}?size=160`, alt: "", loading: "lazy", decoding: "async" });
  const under = make("span", { className: "under" }, make("span", { textContent: result.score.toFixed(3) }), ...badge);
  const button = make("button", { className: "entry", type: "button", onclick: () => open(result.id) },
    make("span", { className: "place", textContent: place + 1 }), make("span", { className: "plate" }, image),
    make("span", { className: "text" }, make("span", { className: "title", textContent: title }), under));
  button.dataset.id = result.id;
  return make("li", {}, button);
}

// Highlights both places of a product and the curve between them.
const highlight = (event) => {
  const id = event.target.closest?.("[data-id]")?.dataset.id;
  for (const part of $("compare").querySelectorAll("[data-id]")) part.classList.toggle("lit", part.dataset.id === id);
  $("compare").classList.toggle("highlighting", id !== undefined);
};
for (const name of ["pointerover", "pointerout", "focusin", "focusout"]) {
  $("compare").addEventListener(name, (event) => highlight(name.endsWith("out") ? { target: document.body } : event));
}
