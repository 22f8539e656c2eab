"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  // What each picker chose is shown, the rest of its kind hidden.
  const picks = all("select[data-picks]");
  const choose = () => {
    const chosen = new Map(picks.map((pick) => [pick.dataset.picks, pick.value]));
    for (const shown of all("[data-score], [data-guide], [data-steps]")) {
      shown.hidden = [...chosen].some(
        ([what, value]) => what in shown.dataset && shown.dataset[what] !== value);
    }
  };
  for (const pick of picks) pick.addEventListener("change", choose);
  choose(); // a browser may have kept an earlier choice

  // Tables sort by a column; what is missing goes last.
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent;
    return text === "" || isNaN(text) ? text : Number(text);
  };
  for (const button of all("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
      keyed.sort(([a], [b]) => {
        if (a === "-" || b === "-") return (a === "-") - (b === "-");
        const order = typeof a === "number" && typeof b === "number"
          ? a - b : String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      body.append(...keyed.map(([, row]) => row));
    });
  }

  // A point's row of the table, beside the pointer.
  const tip = document.getElementById("tip");
  const table = document.getElementById("rows");
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = new Map([...table.tBodies[0].rows].map((row) => [row.dataset.row, row]));
  const known = new WeakMap();
  const points = (svg) => {
    if (!known.has(svg)) {
      known.set(svg, all(".dots[data-rows]", svg).flatMap((dots) => {
        const numbers = dots.dataset.rows.split(" ");
        const places = dots.getAttribute("d").match(/[\d.]+/g);
        return numbers.map((row, i) => ({ x: +places[2 * i], y: +places[2 * i + 1], row }));
      }));
    }
    return known.get(svg);
  };
  const hide = () => {
    tip.hidden = true;
    for (const ring of all(".hover")) ring.remove();
  };
  const show = (svg, event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse());
    let near = null;
    let least = 16;
    for (const point of points(svg)) {
      const distance = Math.hypot(point.x - at.x, point.y - at.y);
      if (distance < least) [near, least] = [point, distance];
    }
    hide();
    if (!near) return;
    const ring = document.createElementNS(svg.namespaceURI, "circle");
    ring.setAttribute("class", "hover");
    ring.setAttribute("cx", near.x);
    ring.setAttribute("cy", near.y);
    ring.setAttribute("r", 7);
    svg.append(ring);
    const list = document.createElement("dl");
    [...rows.get(near.row).cells].forEach((cell, i) => {
      if (cell.textContent === "-") return;
      const name = document.createElement("dt");
      const text = document.createElement("dd");
      [name.textContent, text.textContent] = [heads[i], cell.textContent];
      list.append(name, text);
    });
    tip.replaceChildren(list);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 14 + width > innerWidth
      ? event.clientX - 14 - width : event.clientX + 14;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4))}px`;
  };
  for (const svg of all(".charts svg")) {
    svg.addEventListener("pointermove", (event) => show(svg, event));
    svg.addEventListener("pointerdown", (event) => show(svg, event));
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  }
  addEventListener("pointerdown", (event) => event.target.closest(".charts svg") || hide());
  addEventListener("scroll", hide, { passive: true });
})();
