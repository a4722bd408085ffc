import { compare } from "./compare.js";
import { $, make, moved } from "./elements.js";
import { buildFilters, showFilters } from "./filters.js";
import { dataUri, shrink } from "./pictures.js";
import { fill } from "./product.js";
import { ask, fetchJson } from "./server.js";
import { MOST, PAGE, address, read, searching } from "./state.js";
import { explain } from "./why.js";

const PAUSE = 250;        // milliseconds after the last keystroke before a search starts

let gallery = null;
let asked = null;         // aborts the previous request
let requested = "";       // state that the cards show or are loading
let found = [];           // the newest results
const captions = new Map();  // id -> name, for the chip of "more like this"

function change(changes, { replace = false } = {}) {
  const state = { ...read(), ...changes };
  history[replace ? "replaceState" : "pushState"](null, "", address(state));
  show();
}

async function take(file) {
  if (!file) return;
  try {
    change({ picture: await shrink(file, gallery.picture_size), like: null, k: PAGE, open: null });
  } catch {
    tell(`${file.name || "This"} is no picture that this browser can read.`, true);
  }
}

// Rendering

function tell(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function show() {
  const state = read();
  if ($("q").value !== state.q && document.activeElement !== $("q")) $("q").value = state.q;
  document.title = state.q ? `${state.q} · ${gallery.name}` : `${gallery.name}: product search`;
  showChips(state);
  showFilters(state.filters);
  $("orders").hidden = !gallery.second_stage || !state.q.trim();
  for (const radio of $("orders").querySelectorAll("input")) radio.checked = radio.value === state.order;
  $("clear").hidden = !searching(state) && !state.filters.length;
  $("suggestions").hidden = searching(state) || state.filters.length > 0 || !gallery.suggestions.length;
  showProduct(state.open);

  const wanted = JSON.stringify({ ...state, open: null });
  if (wanted === requested) return;
  requested = wanted;
  asked?.abort();
  asked = new AbortController();
  const started = performance.now();
  $("cards").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(state, asked.signal);
    showResults(state, answer);
    tell(summary(state, answer, performance.now() - started));
    const count = Math.min(answer.results.length, state.k);
    $("more").hidden = count < state.k || state.k >= MOST || count >= answer.matching;
  } catch (error) {
    if (error.name === "AbortError") return;
    requested = "";
    showResults(state, { results: [] });
    $("more").hidden = true;
    tell(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message, true);
  }
  $("cards").removeAttribute("aria-busy");
}

function summary(state, answer, milliseconds) {
  const number = (count) => count.toLocaleString("en");
  if (!answer.results.length) return "No product passes these filters.";
  const matching = `${number(answer.matching)} ${answer.matching === 1 ? "product" : "products"}`;
  if (!searching(state)) return state.filters.length ? matching : `${matching} in ${gallery.name}`;
  return `The nearest ${number(Math.min(answer.results.length, state.k))} of ${matching}, in ${Math.round(milliseconds)} ms`;
}

function showResults(state, answer) {
  found = answer.results;
  const both = state.order === "both" && Boolean(answer.first_stage);
  $("cards").hidden = both;
  $("compare").hidden = !both;
  showCards(both ? [] : found.slice(0, state.k), searching(state));
  compare(both ? answer.first_stage : [], both ? found : [], state.k, (id) => change({ open: id }));
  if (shown !== null) explainShown();
}

function showCards(results, scored) {
  $("cards").replaceChildren(...results.map((result, place) => {
    if (result.caption) captions.set(result.id, result.caption);
    const title = result.caption || result.category || result.id;
    const image = make("img", { src: `${result.image.slice(1)}?size=400`, alt: "", loading: "lazy", decoding: "async" });
    const under = make("span", { className: "under" }, make("span", { textContent: result.caption ? result.category : result.id }));
    if (scored) under.append(make("span", { textContent: result.score.toFixed(3), title: result.before === null ? "Cosine of the picture with the query" : "Score of the second stage" }));
    const card = make("button", { className: "card", type: "button", onclick: () => change({ open: result.id }) },
      make("span", { className: "plate" }, image, ...moved(place + 1, result.before)),
      make("span", { className: "text" }, make("span", { className: "title", textContent: title }), under));
    card.dataset.id = result.id;
    const like = make("button", { className: "like", type: "button", textContent: "More like this", onclick: () => similar(result.id) });
    like.setAttribute("aria-label", `More like ${title}`);
    return make("li", {}, card, like);
  }));
}

function similar(id) {
  $("q").value = "";
  scrollTo({ top: 0 });
  change({ like: id, q: "", picture: null, k: PAGE, open: null });
}

function chip(image, text, label, remove) {
  const button = make("button", { className: "chip", type: "button", title: label, onclick: remove },
    make("img", { src: image, alt: "" }), make("span", { textContent: text }), "×");
  button.setAttribute("aria-label", label);
  return button;
}

async function learn(id) {
  captions.set(id, id);
  const product = await fetchJson(`v1/products/${encodeURIComponent(id)}`).catch(() => null);
  if (product === null) return;
  captions.set(id, product.caption || id);
  showChips(read());
}

function showChips(state) {
  const chips = [];
  if (state.picture) chips.push(chip(dataUri(state.picture), "picture", "Remove the picture", () => change({ picture: null })));
  if (state.like !== null) {
    const source = `v1/images/${encodeURIComponent(state.like)}?size=64`;
    if (!captions.has(state.like)) learn(state.like);
    chips.push(chip(source, `like ${captions.get(state.like) ?? state.like}`, "Remove the product", () => change({ like: null })));
  }
  $("chips").replaceChildren(...chips);
  $("q").placeholder = chips.length ? "Add words" : "Describe a product";
}

// The product dialog

let shown = null;

async function showProduct(id) {
  if (id === shown) return;
  shown = id;
  if (id === null) {
    $("product").close();
    return;
  }
  try {
    const product = await fetchJson(`v1/products/${encodeURIComponent(id)}`);
    if (shown !== id) return;
    fill(product);
    explainShown();
    $("similar").onclick = () => similar(id);
    if (!$("product").open) $("product").showModal();
    $("similar").focus({ preventScroll: true });  // do not scroll past the picture
  } catch (error) {
    shown = null;
    tell(error.message, true);
  }
}

function explainShown() {
  const place = found.findIndex((result) => result.id === shown);
  explain(found[place], place + 1);
}

$("product").onclose = () => {
  const id = shown;
  if (id === null) return;
  shown = null;
  change({ open: null });
  document.querySelector(`:is(.card, .entry)[data-id="${CSS.escape(id)}"]`)?.focus();
};
$("product").onclick = (event) => {
  if (event.target === $("product") || event.target.classList.contains("close")) $("product").close();
};
$("copy").hidden = !navigator.clipboard;  // browsers disable the clipboard on remote pages without HTTPS
$("copy").onclick = async () => {
  await navigator.clipboard.writeText(location.href);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy link"; }, 1500);
};

// Event handlers

let typing;
$("q").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => change({ q: $("q").value, k: PAGE }, { replace: true }), PAUSE);
};
$("search").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(typing);
  change({ q: $("q").value, k: PAGE });
};
$("picture").onchange = () => {
  take($("picture").files[0]);
  $("picture").value = "";
};
$("clear").onclick = () => {
  $("q").value = "";
  change({ q: "", like: null, filters: [], picture: null, order: "", k: PAGE });
  $("q").focus();
};
$("orders").onchange = (event) => change({ order: event.target.value });
$("more").onclick = () => change({ k: Math.min(MOST, read().k + PAGE) }, { replace: true });

addEventListener("popstate", () => {
  $("q").value = read().q;
  show();
});
addEventListener("paste", (event) => take([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  take(event.dataTransfer.files[0]);
});
addEventListener("keydown", (event) => {
  const inField = event.target.matches("input[type=search]");
  if (event.key === "/" && !inField && !$("product").open) {
    event.preventDefault();
    $("q").focus();
    $("q").select();
    return;
  }
  const cards = [...document.querySelectorAll(".card, .entry")];
  const at = cards.indexOf(document.activeElement);
  if (event.key === "ArrowDown" && event.target === $("q") && cards.length) {
    event.preventDefault();
    cards[0].focus();
  }
  if (at < 0) return;
  const beside = cards[at].matches(".entry");
  const column = cards.findIndex((card) => card.closest("ol") === cards.at(-1).closest("ol"));  // index of the second column's first card
  const across = cards.filter((card) => card.parentElement.offsetTop === cards[0].parentElement.offsetTop).length;
  const [aside, down] = beside ? [column, 1] : [1, across];
  const step = { ArrowLeft: -aside, ArrowRight: aside, ArrowUp: -down, ArrowDown: down }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (event.key === "ArrowUp" && (at < down || (beside && at === column))) $("q").focus();
  else cards[at + step]?.focus();
});

const wide = matchMedia("(min-width: 52.01rem)");
const fold = () => { $("filters").open = wide.matches; };
wide.addEventListener("change", fold);

try {
  gallery = await fetchJson("v1/gallery");
  fold();
  buildFilters(gallery.facets, (filters) => change({ filters, k: PAGE }));
  $("suggestions").append(...gallery.suggestions.map((text) => make("button", {
    type: "button", textContent: text, onclick: () => { $("q").value = text; change({ q: text }); },
  })));
  $("q").value = read().q;
  show();
  if (wide.matches) $("q").focus();
} catch (error) {
  tell(error.message, true);
}
