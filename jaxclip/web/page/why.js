import { $, make } from "./elements.js";

const nth = (place) => {
  const suffix = { one: "st", two: "nd", few: "rd", other: "th" }[new Intl.PluralRules("en", { type: "ordinal" }).select(place)];
  return `${place.toLocaleString("en")}${suffix}`;
};
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

// Explains in the dialog why a result has this place, from 1; hides the explanation if it was not re-ranked.
export function explain(result, place) {
  $("why").hidden = !result || result.before === null;
  if ($("why").hidden) return;
  const places = (count) => `${count} ${count === 1 ? "place" : "places"}`;
  const distance = result.before - place;
  const verdict = distance === 0 ? "unchanged" : distance > 0 ? `up ${places(distance)}` : `down ${places(-distance)}`;
  $("verdict").textContent = `${nth(result.before)} in the first stage, ${nth(place)} after re-ranking: ${verdict}.`;
  $("reasons").hidden = !result.why.length;
  const largest = Math.max(...result.why.map((reason) => Math.abs(reason.added)), 1e-9);
  $("reasons").tBodies[0].replaceChildren(...result.why.map((reason) => row(reason, largest)));
  $("sum").textContent = result.why.length ? `${result.first.toFixed(3)} in the first stage, ${result.score.toFixed(3)} with these features.` : "";
}

function row({ title, meaning, gate, added }, largest) {
  const bar = make("i", { className: added < 0 ? "less" : "more" });
  bar.style.width = `${(50 * Math.abs(added)) / largest}%`;
  return make("tr", { title: meaning }, make("th", { scope: "row", textContent: title }),
    make("td", { textContent: gate.toFixed(2) }), make("td", { className: "track" }, bar), make("td", { textContent: signed(added) }));
}
