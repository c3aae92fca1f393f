// Light and dark, and the search. Without this script the pages are whole; nothing here uses the network.
"use strict";
const root = document.currentScript.dataset.root;

const button = document.getElementById("scheme");
const dark = () => {
  const chosen = document.documentElement.dataset.scheme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const named = () => { button.textContent = dark() ? "Light" : "Dark"; };
const remembered = { get: () => { try { return localStorage.getItem("scheme"); } catch { return null; } },
                     set: (value) => { try { localStorage.setItem("scheme", value); } catch { /* not kept */ } } };
if (remembered.get()) document.documentElement.dataset.scheme = remembered.get();
button.hidden = false;
named();
button.addEventListener("click", () => {
  const next = dark() ? "light" : "dark";
  document.documentElement.dataset.scheme = next;
  remembered.set(next);
  named();
});

// A page opened from a disk may not fetch, but it may load a script: the index is one.
const form = document.querySelector(".search"), query = document.getElementById("query"), list = document.getElementById("found");
form.hidden = false;
let loading;
const index = () => loading ??= new Promise((done, failed) => {
  const script = document.createElement("script");
  script.src = `${root}/search.js`;
  script.onload = () => done(window.PAGES);
  script.onerror = failed;
  document.head.append(script);
});
const score = (entry, words) => {
  let total = 0;
  for (const word of words) {
    const title = entry.title.toLowerCase(), text = entry.text.toLowerCase();
    if (title.includes(word)) total += 10;
    else if (text.includes(word)) total += 1;
    else return 0;
  }
  return total;
};
const marked = (parent, text, words) => {
  const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 50);
  const part = (at ? "… " : "") + text.slice(at, at + 150);
  const pattern = new RegExp(`(${words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
  part.split(pattern).forEach((piece, i) => {
    const node = document.createElement(i % 2 ? "mark" : "span");
    node.textContent = piece;
    parent.append(node);
  });
};
const show = async () => {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const entries = words.length ? await index() : [];
  const hits = entries.map((entry) => [score(entry, words), entry]).filter(([s]) => s).sort((a, b) => b[0] - a[0]).slice(0, 12);
  list.replaceChildren(...hits.map(([, entry]) => {
    const item = document.createElement("li"), link = document.createElement("a"), text = document.createElement("small");
    link.href = `${root}/${entry.url}`;
    link.textContent = entry.title;
    marked(text, entry.text, words);
    item.append(link, text);
    return item;
  }));
};
query.addEventListener("input", show);
form.addEventListener("submit", (event) => { event.preventDefault(); list.querySelector("a")?.click(); });
form.addEventListener("keydown", (event) => { if (event.key === "Escape") { query.value = ""; show(); } });
