// The URL of the page is its only state: everything is read from it and every change is written to it.

export const PAGE_SIZE = 24, MAX_RESULTS = 100;
const ORDERS = ["both", "first"];  // the default, "", is re-ranked if there is a second stage

export function readState() {
  const query = new URLSearchParams(location.search);
  const k = Number.parseInt(query.get("k"), 10);
  return {
    q: query.get("q") ?? "",
    like: query.get("like"),
    filters: query.getAll("filter"),
    k: k >= 1 && k <= MAX_RESULTS ? k : PAGE_SIZE,
    order: ORDERS.includes(query.get("order")) ? query.get("order") : "",
    open: query.get("open"),
    picture: new URLSearchParams(location.hash.slice(1)).get("picture"),
  };
}

export function pageUrl(state) {
  const query = new URLSearchParams();
  if (state.q) query.set("q", state.q);
  if (state.like !== null) query.set("like", state.like);
  for (const filter of state.filters) query.append("filter", filter);
  if (state.k !== PAGE_SIZE) query.set("k", state.k);
  if (state.order) query.set("order", state.order);
  if (state.open !== null) query.set("open", state.open);
  const text = query.toString();
  return location.pathname + (text && `?${text}`) + (state.picture ? `#picture=${state.picture}` : "");
}

export const searching = (state) => Boolean(state.q.trim() || state.like !== null || state.picture);
