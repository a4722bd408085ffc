// The address bar is the state: everything is read from it and every change is written to it.

const $ = (id) => document.getElementById(id);
const PAGE = 24, MOST = 100, SHOWN_VALUES = 6, PAUSE = 250;

let gallery = null;
let asked = null;         // aborts the request before
let requested = "";       // what the cards show or are about to show
const captions = new Map();  // id -> name, for the chip of "more like this"

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// State

function read() {
  const query = new URLSearchParams(location.search);
  const k = Number.parseInt(query.get("k"), 10);
  return {
    q: query.get("q") ?? "",
    like: query.get("like"),
    filters: query.getAll("filter"),
    k: k >= 1 && k <= MOST ? k : PAGE,
    open: query.get("open"),
    picture: new URLSearchParams(location.hash.slice(1)).get("picture"),
  };
}

function address(state) {
  const query = new URLSearchParams();
  if (state.q) query.set("q", state.q);
  if (state.like !== null) query.set("like", state.like);
  for (const filter of state.filters) query.append("filter", filter);
  if (state.k !== PAGE) query.set("k", state.k);
  if (state.open !== null) query.set("open", state.open);
  const text = query.toString();
  return location.pathname + (text && `?${text}`) + (state.picture ? `#picture=${state.picture}` : "");
}

function change(changes, { replace = false } = {}) {
  const state = { ...read(), ...changes };
  history[replace ? "replaceState" : "pushState"](null, "", address(state));
  show();
}

const searching = (state) => Boolean(state.q.trim() || state.like !== null || state.picture);

// Pictures: the server needs no more pixels than the towers see, so that few travel, and fit into the address.

async function shrink(file) {
  const bitmap = await createImageBitmap(file);
  const shorter = Math.min(bitmap.width, bitmap.height), longer = Math.max(bitmap.width, bitmap.height);
  const scale = Math.min(1, gallery.picture_size / shorter, (3 * gallery.picture_size) / longer);
  const canvas = make("canvas", {
    width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)),
  });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const encoded = canvas.toDataURL("image/jpeg", 0.85).split(",")[1];
  return encoded.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

const dataUri = (picture) => `data:image/jpeg;base64,${picture.replaceAll("-", "+").replaceAll("_", "/")}`;

function bytes(picture) {
  const text = atob(picture.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

async function take(file) {
  if (!file) return;
  try {
    change({ picture: await shrink(file), like: null, k: PAGE, open: null });
  } catch {
    tell(`${file.name || "This"} is no picture that this browser can read.`, true);
  }
}

// Asking the server

async function fetchJson(url, options = {}) {
  const response = await fetch(url, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail ?? `The server answered ${response.status}.`);
  return answer;
}

function ask(state, signal) {
  const query = new URLSearchParams({ k: state.k });
  for (const filter of state.filters) query.append("filter", filter);
  if (!searching(state)) return fetchJson(`v1/products?${query}`, { signal });
  if (state.q.trim()) query.set("q", state.q);
  if (state.like !== null) query.set("like", state.like);
  if (!state.picture) return fetchJson(`v1/search?${query}`, { signal });
  const body = new Blob([bytes(state.picture)], { type: "image/jpeg" });
  return fetchJson(`v1/search?${query}`, { signal, method: "POST", headers: { "Content-Type": "image/jpeg" }, body });
}

// Showing

function tell(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function show() {
  const state = read();
  if ($("q").value !== state.q && document.activeElement !== $("q")) $("q").value = state.q;
  document.title = state.q ? `${state.q} · ${gallery.name}` : `${gallery.name}: product search`;
  showChips(state);
  showFilters(state);
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
    showCards(answer.results, searching(state));
    tell(summary(state, answer, performance.now() - started));
    $("more").hidden = answer.results.length < state.k || state.k >= MOST || answer.results.length >= answer.matching;
  } catch (error) {
    if (error.name === "AbortError") return;
    requested = "";
    $("cards").replaceChildren();
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
  return `The nearest ${number(answer.results.length)} of ${matching}, in ${Math.round(milliseconds)} ms`;
}

function showCards(results, scored) {
  $("cards").replaceChildren(...results.map((result) => {
    if (result.caption) captions.set(result.id, result.caption);
    const title = result.caption || result.category || result.id;
    const image = make("img", { src: `${result.image.slice(1)}?size=400`, alt: "", loading: "lazy", decoding: "async" });
    const under = make("span", { className: "under" }, make("span", { textContent: result.caption ? result.category : result.id }));
    if (scored) under.append(make("span", { textContent: result.score.toFixed(3), title: "Cosine of the picture with the query" }));
    const card = make("button", { className: "card", type: "button", onclick: () => change({ open: result.id }) },
      make("span", { className: "plate" }, image),
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

function showChips(state) {
  const chips = [];
  if (state.picture) chips.push(chip(dataUri(state.picture), "picture", "Remove the picture", () => change({ picture: null })));
  if (state.like !== null) {
    const source = `v1/images/${encodeURIComponent(state.like)}?size=64`;
    chips.push(chip(source, `like ${captions.get(state.like) ?? state.like}`, "Remove the product", () => change({ like: null })));
  }
  $("chips").replaceChildren(...chips);
  $("q").placeholder = chips.length ? "Add words" : "Describe a product";
}

// Filters

const words = (name) => {
  const spaced = name.replaceAll("_", " ").replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return spaced.charAt(0).toUpperCase() + spaced.slice(1);
};

function buildFilters() {
  for (const facet of gallery.facets) {
    const values = facet.values.map((value) => {
      const box = make("input", { type: "checkbox", name: "filter", value: `${facet.name}:${value.value}` });
      if (facet.colour) {
        const label = make("label", { className: "swatch", title: `${value.value} (${value.products.toLocaleString("en")})` }, box);
        box.setAttribute("aria-label", `${value.value}, ${value.products} products`);
        if (value.swatch) label.style.background = value.swatch;
        return label;
      }
      return make("label", { className: "value" }, box, make("span", { textContent: value.value, title: value.value }),
        make("small", { textContent: value.products.toLocaleString("en") }));
    });
    const set = make("fieldset", {}, make("legend", { textContent: words(facet.name) }));
    if (facet.colour) {
      set.append(make("div", { className: "swatches" }, ...values));
    } else {
      set.append(...values);
      const rest = values.slice(SHOWN_VALUES);
      if (rest.length > 1) {
        for (const label of rest) label.hidden = true;
        const button = make("button", { className: "rest", type: "button", textContent: `${rest.length} more` });
        button.onclick = () => {
          for (const label of rest) label.hidden = false;
          button.remove();
          rest[0].querySelector("input").focus();
        };
        set.append(button);
      }
    }
    $("facets").append(set);
  }
  $("facets").onchange = () => {
    const chosen = [...$("facets").querySelectorAll(":checked")].map((box) => box.value);
    change({ filters: chosen, k: PAGE });
  };
}

function showFilters(state) {
  for (const box of $("facets").querySelectorAll("input")) {
    box.checked = state.filters.includes(box.value);
    if (box.checked) box.parentElement.hidden = false;
  }
  $("chosen").textContent = state.filters.length ? `(${state.filters.length})` : "";
}

// A product

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
    if (!$("product").open) $("product").showModal();
    $("similar").focus();
  } catch (error) {
    shown = null;
    tell(error.message, true);
  }
}

function fill(product) {
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
    make("dt", { textContent: words(name) }), make("dd", { textContent: value }),
  ]));
  $("similar").onclick = () => similar(product.id);
}

$("product").onclose = () => {
  const id = shown;
  if (id === null) return;
  shown = null;
  change({ open: null });
  document.querySelector(`.card[data-id="${CSS.escape(id)}"]`)?.focus();
};
$("product").onclick = (event) => {
  if (event.target === $("product") || event.target.classList.contains("close")) $("product").close();
};
$("copy").onclick = async () => {
  await navigator.clipboard?.writeText(location.href);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy link"; }, 1500);
};

// What a person does

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
  change({ q: "", like: null, filters: [], picture: null, k: PAGE });
  $("q").focus();
};
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
  const inField = event.target.matches("input:not([type=checkbox])");
  if (event.key === "/" && !inField && !$("product").open) {
    event.preventDefault();
    $("q").focus();
    $("q").select();
    return;
  }
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (event.key === "ArrowDown" && event.target === $("q") && cards.length) {
    event.preventDefault();
    cards[0].focus();
  }
  if (at < 0) return;
  const across = cards.filter((card) => card.offsetParent && card.parentElement.offsetTop === cards[0].parentElement.offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (at + step < 0) $("q").focus();
  else cards[at + step]?.focus();
});

const wide = matchMedia("(min-width: 52.01rem)");
const fold = () => { $("filters").open = wide.matches; };
wide.addEventListener("change", fold);

try {
  gallery = await fetchJson("v1/gallery");
  fold();
  buildFilters();
  $("suggestions").append(...gallery.suggestions.map((text) => make("button", {
    type: "button", textContent: text, onclick: () => { $("q").value = text; change({ q: text }); },
  })));
  $("q").value = read().q;
  show();
  if (wide.matches) $("q").focus();
} catch (error) {
  tell(error.message, true);
}
