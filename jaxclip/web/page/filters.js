import { $, displayName, make } from "./elements.js";

const SHOWN_VALUES = 6;

// Fills the sidebar with checkboxes; calls `onChange` with the checked filters whenever one changes.
export function buildFilters(facets, onChange) {
  for (const facet of facets) {
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
    const legend = make("legend", { textContent: displayName(facet.name) });
    const fieldset = make("fieldset", {}, legend);
    if (facet.colour) {
      legend.append(make("span", { className: "names" }));
      fieldset.append(make("div", { className: "swatches" }, ...values));
    } else {
      fieldset.append(...values);
      const rest = values.slice(SHOWN_VALUES);
      if (rest.length > 1) {
        for (const label of rest) label.hidden = true;
        const button = make("button", { className: "rest", type: "button", textContent: `${rest.length} more` });
        button.onclick = () => {
          for (const label of rest) label.hidden = false;
          button.remove();
          rest[0].querySelector("input").focus();
        };
        fieldset.append(button);
      }
    }
    $("facets").append(fieldset);
  }
  $("facets").onchange = () => {
    onChange([...$("facets").querySelectorAll(":checked")].map((box) => box.value));
  };
}

export function showFilters(filters) {
  for (const box of $("facets").querySelectorAll("input")) {
    box.checked = filters.includes(box.value);
    if (box.checked) box.parentElement.hidden = false;
  }
  // Swatches have no text, so the heading lists the names of the checked colours.
  for (const names of $("facets").querySelectorAll(".names")) {
    const checked = names.closest("fieldset").querySelectorAll(":checked");
    names.textContent = [...checked].map((box) => box.value.slice(box.value.indexOf(":") + 1)).join(", ");
  }
  $("chosen").textContent = filters.length ? `(${filters.length})` : "";
}
