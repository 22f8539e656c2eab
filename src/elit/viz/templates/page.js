"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  // What each picker chose is shown, the rest of its kind hidden.
  const picks = all("select[data-picks]");
  const choose = () => {
    for (const shown of all("[data-score], [data-guide], [data-steps]")) {
      shown.hidden = picks.some(({ dataset: { picks: what }, value }) =>
        what in shown.dataset && shown.dataset[what] !== value);
    }
  };
  for (const pick of picks) pick.addEventListener("change", choose);
  choose(); // a browser may have kept an earlier choice

  // The table sorts by a column: by numbers and fractions, then words, what is missing last.
  const table = document.getElementById("rows");
  const value = (row, column) => {
    const text = row.cells[column].textContent;
    const [one, other = 1] = text.split("/");
    return isNaN(one / other) ? text : one / other;
  };
  for (const button of all("button", table)) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = [...table.tBodies[0].rows].map((row) => [value(row, head.cellIndex), row]);
      keyed.sort(([a], [b]) => {
        if (a === "-" || b === "-") return (a === "-") - (b === "-");
        const order = a - b || String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      table.tBodies[0].append(...keyed.map(([, row]) => row));
    });
  }

  // The row of the point next to the pointer, beside it.
  const tip = document.getElementById("tip");
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = new Map([...table.tBodies[0].rows].map((row) => [row.dataset.row, row]));
  const hide = () => {
    tip.hidden = true;
    for (const point of all(".near")) point.classList.remove("near");
  };
  const show = (event) => {
    hide();
    const svg = event.currentTarget;
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse());
    const away = ({ x, y }) => Math.hypot(x.baseVal.value - at.x, y.baseVal.value - at.y);
    const [near] = all("[data-row]", svg).filter((point) => away(point) < 14)
      .sort((one, two) => away(one) - away(two));
    if (!near) return;
    near.classList.add("near");
    const cells = [...rows.get(near.dataset.row).cells].map((cell) => cell.textContent);
    tip.replaceChildren(...cells.flatMap((text, i) => text === "-" ? [] : [["dt", heads[i]], ["dd", text]])
      .map(([name, text]) => Object.assign(document.createElement(name), { textContent: text })));
    tip.hidden = false;
    const place = (point, size, limit) => Math.max(4, point + 14 + size > limit ? point - 14 - size : point + 14);
    tip.style.left = `${place(event.clientX, tip.offsetWidth, innerWidth)}px`;
    tip.style.top = `${place(event.clientY, tip.offsetHeight, innerHeight)}px`;
  };
  for (const svg of all(".charts svg")) {
    for (const what of ["pointermove", "pointerdown"]) svg.addEventListener(what, show);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  }
  addEventListener("pointerdown", (event) => event.target.closest(".charts svg") || hide());
  addEventListener("scroll", hide, { passive: true });
})();
