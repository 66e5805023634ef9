"use strict";
document.documentElement.classList.add("js");
const box = document.querySelector("#search"), count = document.querySelector("#count"), tip = document.querySelector("#tip");
const names = JSON.parse(document.querySelector("#vocabulary").textContent);
const rows = [...document.querySelectorAll(".row")].map(row => ({ row, said: row.textContent.toLowerCase() }));
const groups = [...document.querySelectorAll(".group")].reverse(); // passes before the steps they are in

function search() {
  const wanted = box.value.trim().toLowerCase();
  let found = 0;
  for (const { row, said } of rows) {
    row.hidden = !said.includes(wanted);
    found += !row.hidden;
    if (wanted && !row.hidden) row.classList.add("open");
  }
  for (const group of groups) group.hidden = wanted !== "" && !group.querySelector(".row:not([hidden])");
  count.textContent = wanted ? `${found} of ${rows.length} shown rows` : `${rows.length} rows`;
  highlight(wanted);
  const hash = wanted ? "#q=" + encodeURIComponent(box.value.trim()) : "";
  if (hash !== location.hash) try { history.replaceState(null, "", hash || location.pathname + location.search); } catch { /* a browser that keeps the address of a local file */ }
}

// What was found is marked without touching the page: across tokens, the first two hundred places.
function highlight(wanted) {
  if (!window.Highlight || !CSS.highlights) return;
  CSS.highlights.delete("found");
  const ranges = [];
  for (const { row } of wanted ? rows : []) {
    if (row.hidden || ranges.length > 200) continue;
    const walker = document.createTreeWalker(row, NodeFilter.SHOW_TEXT), nodes = [];
    let whole = "";
    while (walker.nextNode()) { nodes.push([whole.length, walker.currentNode]); whole += walker.currentNode.data; }
    const at = position => {
      const [start, node] = nodes.findLast(([start]) => start <= position);
      return [node, Math.min(position - start, node.length)];
    };
    whole = whole.toLowerCase();
    for (let from = whole.indexOf(wanted); from >= 0 && ranges.length <= 200; from = whole.indexOf(wanted, from + wanted.length)) {
      const range = new Range();
      range.setStart(...at(from));
      range.setEnd(...at(from + wanted.length));
      ranges.push(range);
    }
  }
  if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
}

function describe(token) {
  const text = token.parentElement, index = [...text.querySelectorAll("i")].indexOf(token);
  const ids = text.dataset.ids.split(" "), id = ids[index], learned = token.classList.contains("s");
  const kind = token.classList.contains("c") ? "\ncontrol token" : token.classList.contains("l") ? "\nthe row's own text, no control token" : "";
  const facts = (at, id) => `token ${at}   id ${id}   label ${learned ? id : -100}   piece ${JSON.stringify(names[id])}`;
  const lines = [facts(index, id)];
  for (let next = token.nextElementSibling; next?.matches("i.e"); next = next.nextElementSibling) {
    lines.push(facts(index + lines.length, ids[index + lines.length]));
  }
  tip.textContent = `${lines.join("\n")}\ntext ${JSON.stringify(token.textContent)}${kind}`;
  tip.hidden = false;
  const at = token.getBoundingClientRect();
  const above = at.top - tip.offsetHeight - 6;
  tip.style.top = (above > 60 ? above : at.bottom + 6) + "px";
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8)) + "px";
}

document.addEventListener("pointerover", event => {
  const token = event.target.closest?.(".text i");
  if (token) describe(token); else tip.hidden = true;
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.addEventListener("click", event => {
  if (event.target.matches(".row button")) event.target.closest(".row").classList.add("open");
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape" && document.activeElement === box) { box.value = ""; search(); }
});
let waiting;
box.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 60); });
function fromAddress() {
  const asked = /^#q=(.*)$/s.exec(location.hash);
  try { if (asked) box.value = decodeURIComponent(asked[1]); } catch { box.value = asked[1]; }
  search();
}
window.addEventListener("hashchange", fromAddress);
fromAddress();
