// Requests to the HTTP API.

import { bytes } from "./pictures.js";
import { MAX_RESULTS, searching } from "./state.js";

export async function fetchJson(url, options = {}) {
  const response = await fetch(url, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail ?? `The server answered ${response.status}.`);
  return answer;
}

export function requestResults(state, signal) {
  // The side-by-side view also needs the places of products that re-ranking moved out of the top k.
  const query = new URLSearchParams({ k: state.order === "both" ? MAX_RESULTS : state.k });
  for (const filter of state.filters) query.append("filter", filter);
  if (!searching(state)) return fetchJson(`v1/products?${query}`, { signal });
  if (state.q.trim()) query.set("q", state.q);
  if (state.like !== null) query.set("like", state.like);
  if (state.order === "first") query.set("rerank", "false");
  if (!state.picture) return fetchJson(`v1/search?${query}`, { signal });
  const body = new Blob([bytes(state.picture)], { type: "image/jpeg" });
  return fetchJson(`v1/search?${query}`, { signal, method: "POST", headers: { "Content-Type": "image/jpeg" }, body });
}
