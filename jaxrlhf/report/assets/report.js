"use strict";
// Everything from data goes into the page as text, never as markup. The page asks the network for nothing; a served one asks its own
// address whether it has changed.
(() => {
  const $ = (id) => document.getElementById(id);
  const parsed = (id) => JSON.parse($(id).textContent);
  const store = { get: (k) => { try { return sessionStorage.getItem(k); } catch { return null; } },
                  set: (k, v) => { try { sessionStorage.setItem(k, v); } catch { /* private mode: not kept */ } } };

  // Missing values stand last, whichever way a column is sorted.
  const compare = (a, b, down) => {
    const none = (x) => x === null || x === undefined || x === "";
    if (none(a) || none(b)) return none(a) - none(b);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    return down ? -order : order;
  };

  const sortable = (table, onSort) => {
    table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
      const th = button.parentElement, first = th.dataset.first || "descending";
      const now = th.getAttribute("aria-sort"), other = first === "descending" ? "ascending" : "descending";
      const next = now === first ? other : first;
      table.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", next);
      onSort(th, next === "descending");
    }));
  };

  const summary = $("summary");
  if (summary) sortable(summary, (th, down) => {
    const at = [...th.parentElement.children].indexOf(th), body = summary.tBodies[0];
    const value = (row) => { const raw = row.cells[at].dataset.value; return raw === undefined ? row.cells[at].textContent : raw === "" ? null : Number(raw); };
    [...body.rows].sort((a, b) => compare(value(a), value(b), down)).forEach((row) => body.append(row));
  });

  const table = $("sample-table");
  if (table) {
    const { columns, arms, rows } = parsed("sample-data");
    const index = Object.fromEntries(columns.map((name, i) => [name, i]));
    const PAGE = 50;
    const armBox = $("arm"), roundBox = $("round"), filterBox = $("filter"), endedBox = $("ended"), body = table.tBodies[0];
    let sort = null, down = false, shown = PAGE;

    const option = (box, value, text) => { const one = document.createElement("option"); one.value = value; one.textContent = text; box.append(one); };
    arms.forEach((name, i) => option(armBox, String(i), name));
    const rounds = () => {
      const kept = roundBox.value, of = rows.filter((r) => armBox.value === "" || r[index.arm] === Number(armBox.value));
      roundBox.replaceChildren();
      option(roundBox, "", "all");
      [...new Set(of.map((r) => r[index.round]))].sort((a, b) => a - b).forEach((n) => option(roundBox, String(n), n === 0 ? "SFT" : String(n)));
      roundBox.value = [...roundBox.options].some((o) => o.value === kept) ? kept : "";
    };
    const number = (x, digits) => (x === null ? "–" : x.toFixed(digits));
    const cell = (row, text, cls) => { const td = row.insertCell(); if (cls) td.className = cls; td.textContent = text; return td; };
    const long = (row, text) => { const td = row.insertCell(); td.className = "text"; const div = document.createElement("div"); div.className = "cut"; div.textContent = text === null ? "–" : text === "" ? "(empty)" : text; td.append(div); };

    const draw = () => {
      const words = filterBox.value.toLowerCase();
      let found = rows.filter((r) => (armBox.value === "" || r[index.arm] === Number(armBox.value)) && (roundBox.value === "" || r[index.round] === Number(roundBox.value))
        && (endedBox.value === "" || r[index.ended] === (endedBox.value === "yes"))
        && (words === "" || ["prompt", "response", "reference"].some((name) => (r[index[name]] || "").toLowerCase().includes(words))));
      if (sort) found = [...found].sort((a, b) => compare(sort === "arm" ? arms[a[index.arm]] : a[index[sort]], sort === "arm" ? arms[b[index.arm]] : b[index[sort]], down));
      body.replaceChildren();
      found.slice(0, shown).forEach((r) => {
        const row = body.insertRow();
        cell(row, arms[r[index.arm]]);
        cell(row, r[index.round] === 0 ? "SFT" : String(r[index.round]));
        ["prompt", "response", "reference"].forEach((name) => long(row, r[index[name]]));
        ["gold", "proxy", "kl"].forEach((name) => cell(row, number(r[index[name]], 2)));
        cell(row, number(r[index.length], 0));
        const ended = r[index.ended];
        cell(row, ended === null ? "–" : ended ? "yes" : "no", ended === false ? "no" : "");
      });
      $("count").textContent = `${Math.min(shown, found.length)} of ${found.length} shown`;
      $("more").hidden = found.length <= shown;
      store.set("samples", JSON.stringify([armBox.value, roundBox.value, filterBox.value, endedBox.value]));
    };
    const fresh = () => { shown = PAGE; draw(); };
    sortable(table, (th, d) => { sort = th.dataset.key; down = d; fresh(); });
    armBox.addEventListener("change", () => { rounds(); fresh(); });
    [roundBox, endedBox].forEach((box) => box.addEventListener("change", fresh));
    filterBox.addEventListener("input", fresh);
    $("more").addEventListener("click", () => { shown += PAGE; draw(); });
    rounds();
    try {
      const [a, r, f, e] = JSON.parse(store.get("samples") || "[]");
      if (a !== undefined) { armBox.value = a; rounds(); roundBox.value = r; filterBox.value = f; endedBox.value = e; }
      [armBox, roundBox, endedBox].forEach((box) => { if (box.selectedIndex < 0) box.selectedIndex = 0; });
    } catch { /* an older page's */ }
    draw();
  }

  const version = document.documentElement.dataset.version;
  if (version) setInterval(async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== version) location.reload();
    } catch { /* the server is gone; the page stays */ }
  }, 3000);
})();
