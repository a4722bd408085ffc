// Helpers that build elements and their texts.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Returns the name of an attribute as people write it: baseColour becomes "Base colour".
export const displayName = (name) => {
  const spaced = name.replaceAll("_", " ").replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return spaced.charAt(0).toUpperCase() + spaced.slice(1);
};

// Returns [a badge with how far re-ranking moved a product, as "▲3"], or [] if the product did not move or was not
// re-ranked. The tooltip names the product's place in the other list.
export function moveBadge(place, before, stage = "in the first stage", otherPlace = before) {
  if (before === null || before === place) return [];
  const up = before > place, distance = Math.abs(before - place);
  const badge = make("span", { className: up ? "moved up" : "moved down", textContent: `${up ? "▲" : "▼"}${distance}` });
  badge.setAttribute("role", "img");
  badge.setAttribute("aria-label", `${up ? "up" : "down"} ${distance} ${distance === 1 ? "place" : "places"}`);
  badge.title = `Place ${otherPlace} ${stage}`;
  return [badge];
}
