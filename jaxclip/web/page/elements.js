// Builds elements and the words on them.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// An attribute's name as people write it: baseColour is "Base colour".
export const words = (name) => {
  const spaced = name.replaceAll("_", " ").replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return spaced.charAt(0).toUpperCase() + spaced.slice(1);
};

// A badge with how far a product moved from the first stage, as "▲3"; none if it did not move or was not re-ranked.
export function moved(place, before, stage = "in the first stage", there = before) {
  if (before === null || before === place) return [];
  const up = before > place, far = Math.abs(before - place);
  const badge = make("span", { className: up ? "moved up" : "moved down", textContent: `${up ? "▲" : "▼"}${far}` });
  badge.setAttribute("role", "img");
  badge.setAttribute("aria-label", `${up ? "up" : "down"} ${far} ${far === 1 ? "place" : "places"}`);
  badge.title = `Place ${there} ${stage}`;
  return [badge];
}
