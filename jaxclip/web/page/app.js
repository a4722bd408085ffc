import { compare } from "./compare.js";
import { $, make, moveBadge } from "./elements.js";
import { buildFilters, showFilters } from "./filters.js";
import { dataUri, shrink } from "./pictures.js";
import { fillDialog } from "./product.js";
import { fetchJson, requestResults } from "./server.js";
import { MAX_RESULTS, PAGE_SIZE, pageUrl, readState, searching } from "./state.js";
import { explain } from "./why.js";

const TYPING_PAUSE = 250;     // milliseconds after the last keystroke before a search starts

let gallery = null;
let controller = null;        // aborts the previous request
let requestedKey = "";        // the state, as JSON, whose results are on the page or loading
let currentResults = [];      // the results of the last answer
const captions = new Map();   // id -> caption, for the chip of "More like this"

function change(changes, { replace = false } = {}) {
  const state = { ...readState(), ...changes };
  history[replace ? "replaceState" : "pushState"](null, "", pageUrl(state));
  render();
}

async function searchByPicture(file) {
  if (!file) return;
  try {
    change({ picture: await shrink(file, gallery.picture_size), like: null, k: PAGE_SIZE, open: null });
  } catch {
    setStatus(`${file.name || "This file"} is not a picture that this browser can read.`, true);
  }
}

// Rendering

function setStatus(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function render() {
  const state = readState();
  if ($("q").value !== state.q && document.activeElement !== $("q")) $("q").value = state.q;
  document.title = state.q ? `${state.q} · ${gallery.name}` : `${gallery.name}: product search`;
  showChips(state);
  showFilters(state.filters);
  $("orders").hidden = !gallery.second_stage || !state.q.trim();
  for (const radio of $("orders").querySelectorAll("input")) radio.checked = radio.value === state.order;
  $("clear").hidden = !searching(state) && !state.filters.length;
  $("suggestions").hidden = searching(state) || state.filters.length > 0 || !gallery.suggestions.length;
  showProduct(state.open);

  const key = JSON.stringify({ ...state, open: null });
  if (key === requestedKey) return;
  requestedKey = key;
  controller?.abort();
  controller = new AbortController();
  const started = performance.now();
  $("cards").setAttribute("aria-busy", "true");
  try {
    const answer = await requestResults(state, controller.signal);
    showResults(state, answer);
    setStatus(summary(state, answer, performance.now() - started));
    const count = Math.min(answer.results.length, state.k);
    $("more").hidden = count < state.k || state.k >= MAX_RESULTS || count >= answer.matching;
  } catch (error) {
    if (error.name === "AbortError") return;
    requestedKey = "";
    showResults(state, { results: [] });
    $("more").hidden = true;
    setStatus(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message, true);
  }
  $("cards").removeAttribute("aria-busy");
}

function summary(state, answer, milliseconds) {
  const number = (count) => count.toLocaleString("en");
  if (!answer.results.length) return "No product matches these filters.";
  const matching = `${number(answer.matching)} ${answer.matching === 1 ? "product" : "products"}`;
  if (!searching(state)) return state.filters.length ? matching : `${matching} in ${gallery.name}`;
  return `The ${number(Math.min(answer.results.length, state.k))} nearest of ${matching}, in ${Math.round(milliseconds)} ms`;
}

function showResults(state, answer) {
  currentResults = answer.results;
  const both = state.order === "both" && Boolean(answer.first_stage);
  $("cards").hidden = both;
  $("compare").hidden = !both;
  showCards(both ? [] : currentResults.slice(0, state.k), searching(state));
  compare(both ? answer.first_stage : [], both ? currentResults : [], state.k, (id) => change({ open: id }));
  if (shownId !== null) explainShownProduct();
}

function showCards(results, scored) {
  $("cards").replaceChildren(...results.map((result, place) => {
    if (result.caption) captions.set(result.id, result.caption);
    const title = result.caption || result.category || result.id;
    const image = make("img", { src: `${result.image.slice(1)}?size=400`, alt: "", loading: "lazy", decoding: "async" });
    const under = make("span", { className: "under" }, make("span", { textContent: result.caption ? result.category : result.id }));
    if (scored) under.append(make("span", { textContent: result.score.toFixed(3), title: result.before === null ? "Cosine similarity of the picture and the query" : "Score of the second stage" }));
    const card = make("button", { className: "card", type: "button", onclick: () => change({ open: result.id }) },
      make("span", { className: "plate" }, image, ...moveBadge(place + 1, result.before)),
      make("span", { className: "text" }, make("span", { className: "title", textContent: title }), under));
    card.dataset.id = result.id;
    const like = make("button", { className: "like", type: "button", textContent: "More like this", onclick: () => searchSimilar(result.id) });
    like.setAttribute("aria-label", `More like ${title}`);
    return make("li", {}, card, like);
  }));
}

function searchSimilar(id) {
  $("q").value = "";
  scrollTo({ top: 0 });
  change({ like: id, q: "", picture: null, k: PAGE_SIZE, open: null });
}

function chip(image, text, label, remove) {
  const button = make("button", { className: "chip", type: "button", title: label, onclick: remove },
    make("img", { src: image, alt: "" }), make("span", { textContent: text }), "×");
  button.setAttribute("aria-label", label);
  return button;
}

async function fetchCaption(id) {
  captions.set(id, id);
  const product = await fetchJson(`v1/products/${encodeURIComponent(id)}`).catch(() => null);
  if (product === null) return;
  captions.set(id, product.caption || id);
  showChips(readState());
}

function showChips(state) {
  const chips = [];
  if (state.picture) chips.push(chip(dataUri(state.picture), "picture", "Remove the picture", () => change({ picture: null })));
  if (state.like !== null) {
    const source = `v1/images/${encodeURIComponent(state.like)}?size=64`;
    if (!captions.has(state.like)) fetchCaption(state.like);
    chips.push(chip(source, `like ${captions.get(state.like) ?? state.like}`, "Remove the product", () => change({ like: null })));
  }
  $("chips").replaceChildren(...chips);
  $("q").placeholder = chips.length ? "Add words" : "Describe a product";
}

// The product dialog

let shownId = null;

async function showProduct(id) {
  if (id === shownId) return;
  shownId = id;
  if (id === null) {
    $("product").close();
    return;
  }
  try {
    const product = await fetchJson(`v1/products/${encodeURIComponent(id)}`);
    if (shownId !== id) return;
    fillDialog(product);
    explainShownProduct();
    $("similar").onclick = () => searchSimilar(id);
    if (!$("product").open) $("product").showModal();
    $("similar").focus({ preventScroll: true });  // do not scroll past the picture
  } catch (error) {
    shownId = null;
    setStatus(error.message, true);
  }
}

function explainShownProduct() {
  const place = currentResults.findIndex((result) => result.id === shownId);
  explain(currentResults[place], place + 1);
}

$("product").onclose = () => {
  const id = shownId;
  if (id === null) return;
  shownId = null;
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

let typingTimer;
$("q").oninput = () => {
  clearTimeout(typingTimer);
  typingTimer = setTimeout(() => change({ q: $("q").value, k: PAGE_SIZE }, { replace: true }), TYPING_PAUSE);
};
$("search").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(typingTimer);
  change({ q: $("q").value, k: PAGE_SIZE });
};
$("picture").onchange = () => {
  searchByPicture($("picture").files[0]);
  $("picture").value = "";
};
$("clear").onclick = () => {
  $("q").value = "";
  change({ q: "", like: null, filters: [], picture: null, order: "", k: PAGE_SIZE });
  $("q").focus();
};
$("orders").onchange = (event) => change({ order: event.target.value });
$("more").onclick = () => change({ k: Math.min(MAX_RESULTS, readState().k + PAGE_SIZE) }, { replace: true });

addEventListener("popstate", () => {
  $("q").value = readState().q;
  render();
});
addEventListener("paste", (event) => searchByPicture([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  searchByPicture(event.dataTransfer.files[0]);
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
  const index = cards.indexOf(document.activeElement);
  if (event.key === "ArrowDown" && event.target === $("q") && cards.length) {
    event.preventDefault();
    cards[0].focus();
  }
  if (index < 0) return;
  const sideBySide = cards[index].matches(".entry");
  const secondColumn = cards.findIndex((card) => card.closest("ol") === cards.at(-1).closest("ol"));  // index of its first card
  const perRow = cards.filter((card) => card.parentElement.offsetTop === cards[0].parentElement.offsetTop).length;
  const [across, down] = sideBySide ? [secondColumn, 1] : [1, perRow];
  const step = { ArrowLeft: -across, ArrowRight: across, ArrowUp: -down, ArrowDown: down }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (event.key === "ArrowUp" && (index < down || (sideBySide && index === secondColumn))) $("q").focus();
  else cards[index + step]?.focus();
});

const wide = matchMedia("(min-width: 52.01rem)");
const openFiltersIfWide = () => { $("filters").open = wide.matches; };
wide.addEventListener("change", openFiltersIfWide);

try {
  gallery = await fetchJson("v1/gallery");
  openFiltersIfWide();
  buildFilters(gallery.facets, (filters) => change({ filters, k: PAGE_SIZE }));
  $("suggestions").append(...gallery.suggestions.map((text) => make("button", {
    type: "button", textContent: text, onclick: () => { $("q").value = text; change({ q: text }); },
  })));
  $("q").value = readState().q;
  render();
  if (wide.matches) $("q").focus();
} catch (error) {
  setStatus(error.message, true);
}
