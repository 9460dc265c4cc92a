"use strict";

const $ = (id) => document.getElementById(id);
const NODES = 60; // more would be a black ball
let session = null;
let reading = null;
let writing = null;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").className = wrong ? "error" : "";
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const wait = response.headers.get("Retry-After");
  let message = `${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status must do */ }
  throw new Error(wait ? `${message} (try again in ${wait} s)` : message);
}

const post = (path, body, signal) =>
  call(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

/** The JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server has hung up");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue;
      const data = JSON.parse(part.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

/** Run what a button starts; errors are shown, and cancelling is none. */
function on(id, action) {
  $(id).addEventListener("click", async () => {
    say("");
    try { await action(); } catch (error) {
      if (error.name === "AbortError") say("cancelled"); else say(error.message, true);
    }
  });
}

async function connect() {
  const tasks = new Set((await (await call("/v1/models")).json()).data.map((model) => model.task));
  $("read").disabled = !tasks.has("completion");
  $("classifying").hidden = !tasks.has("classify");
  $("extracting").hidden = !tasks.has("extract");
  say(`connected: ${[...tasks].join(", ")}`);
}

const chosen = () => $("file").files[0] ?? new Blob([$("text").value]);

async function content() {
  const text = await chosen().text();
  if (!text.trim()) throw new Error("paste a text or choose a file first");
  return text;
}

const bytes = (n) => (n < 2 ** 20 ? `${(n / 1024).toFixed(0)} KiB` : `${(n / 2 ** 20).toFixed(1)} MiB`);

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Memory of what is kept against tokens read. */
function chart(points) {
  const last = points[points.length - 1];
  const top = Math.max(...points.map((p) => p.cache_bytes)) * 1.25;
  const x = (n) => 50 + (570 * n) / last.total;
  const y = (n) => 120 - (100 * n) / top;
  const line = points.map((p) => `${x(p.read).toFixed(1)},${y(p.cache_bytes).toFixed(1)}`).join(" ");
  $("chart").replaceChildren(
    element("line", { x1: 50, y1: 120, x2: 620, y2: 120, stroke: "currentColor", "stroke-opacity": 0.4 }),
    element("polyline", { points: `50,120 ${line}`, fill: "none", stroke: "var(--ink)", "stroke-width": 2.5 }),
    element("text", { x: 50, y: 14, "font-size": 11, fill: "currentColor" }, `memory kept: ${bytes(last.cache_bytes)}`),
    element("text", { x: 620, y: 135, "font-size": 11, "text-anchor": "end", fill: "currentColor" },
      `${last.read.toLocaleString("en")} of ${last.total.toLocaleString("en")} tokens read`),
  );
}

async function read() {
  const document_ = chosen();
  if (!document_.size) throw new Error("paste a text or choose a file first");
  const old = session;
  session = null;
  $("writing").hidden = true;
  reading = new AbortController();
  $("read").disabled = true;
  $("cancel").disabled = false;
  const points = [];
  const began = performance.now();
  try {
    const response = await call("/v1/sessions?stream=true", {
      method: "POST", body: document_, headers: { "Content-Type": "application/octet-stream" }, signal: reading.signal,
    });
    for await (const event of events(response)) {
      if (event.object === "session") { session = event; continue; }
      points.push(event);
      const seconds = (performance.now() - began) / 1000;
      $("progress").value = event.read / event.total;
      $("figures").textContent = `${event.read.toLocaleString("en")} tokens read, ` +
        `${Math.round(event.read / seconds).toLocaleString("en")} a second, memory kept ${bytes(event.cache_bytes)}`;
      if (points.length > 400) points.splice(0, points.length, ...points.filter((_, i) => i % 2 === points.length % 2));
      chart(points);
    }
  } finally {
    $("read").disabled = false;
    $("cancel").disabled = true;
    reading = null;
  }
  if (old) call(`/v1/sessions/${old.id}`, { method: "DELETE" }).catch(() => {});
  $("writing").hidden = false;
  say(`read once: ${session.tokens.toLocaleString("en")} tokens, kept in ${bytes(session.cache_bytes)}`);
}

async function write() {
  const body = {
    prompt: $("prompt").value, session_id: session.id, max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value), stream: true,
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  writing = new AbortController();
  $("continue").disabled = true;
  $("stop").disabled = false;
  $("output").textContent = body.prompt;
  try {
    for await (const chunk of events(await post("/v1/completions", body, writing.signal)))
      $("output").append(chunk.choices[0]?.text ?? "");
  } finally {
    $("continue").disabled = false;
    $("stop").disabled = true;
    writing = null;
  }
}

function make(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

async function classify() {
  const [result] = (await (await post("/v1/classify", { input: await content() })).json()).data;
  const rows = Object.entries(result.probabilities).sort((a, b) => b[1] - a[1]).map(([label, p]) => {
    const row = make("div", `${label} ${(100 * p).toFixed(1)} %`);
    const bar = make("div", "", "bar");
    bar.style.width = `${100 * p}%`;
    row.append(bar);
    return row;
  });
  if (result.truncated) rows.push(make("p", "Only the beginning was read: the model was trained so."));
  if (result.passages.length) rows.push(make("h3", "What counted most"));
  rows.push(...result.passages.map((passage) => make("blockquote", passage.text)));
  $("classes").replaceChildren(...rows);
}

/** Nodes and edges: entities and relations where the model has learned any, else names that stand near each other. */
function network(found) {
  const nodes = new Map();
  const owners = new Map(); // mention -> node
  const place = ({ start, end, label }) => `${start} ${end} ${label}`;
  const add = (name, label, mention) => {
    const key = `${label}\u0000${name}`;
    if (!nodes.has(key)) nodes.set(key, { name, label, mentions: [] });
    const node = nodes.get(key);
    node.mentions.push(mention);
    return node;
  };
  for (const [name, members] of Object.entries(found.clusters ?? {}))
    for (const mention of members) owners.set(place(mention), add(name, members[0].label, mention));
  const owner = found.entities.map((entity) => owners.get(place(entity)) ?? add(entity.text, entity.label, entity));
  const most = [...nodes.values()].sort((a, b) => b.mentions.length - a.mentions.length).slice(0, NODES);
  const kept = new Set(most);
  const edges = [];
  if (found.relations?.length) {
    const byName = new Map(most.map((node) => [node.name, node]));
    for (const { head, tail, label } of found.relations)
      if (byName.has(head) && byName.has(tail)) edges.push({ a: byName.get(head), b: byName.get(tail), label });
  } else {
    const seen = new Set();
    for (let i = 1; i < found.entities.length; i++) {
      const [a, b] = [owner[i - 1], owner[i]];
      const key = [a, b].map((n) => most.indexOf(n)).sort().join();
      if (a === b || !kept.has(a) || !kept.has(b) || seen.has(key)) continue;
      if (found.entities[i].start - found.entities[i - 1].end > 100) continue;
      seen.add(key);
      edges.push({ a, b, label: null });
    }
  }
  return { nodes: most, edges, all: nodes.size };
}

/** Places: equal nodes repel, edges pull, and the same graph always lies the same way. */
function arrange({ nodes, edges }) {
  nodes.forEach((node, i) => {
    const angle = i * 2.39996; // the golden angle: no two at one place
    node.x = 320 + 20 * Math.sqrt(i + 1) * Math.cos(angle);
    node.y = 210 + 20 * Math.sqrt(i + 1) * Math.sin(angle);
  });
  for (let step = 0; step < 250; step++) {
    const heat = 12 * (1 - step / 250);
    for (const node of nodes) { node.dx = (320 - node.x) * 0.02; node.dy = (210 - node.y) * 0.03; }
    for (let i = 0; i < nodes.length; i++) for (let j = 0; j < i; j++) {
      const dx = nodes[i].x - nodes[j].x, dy = nodes[i].y - nodes[j].y;
      const force = 1800 / (dx * dx + dy * dy + 1);
      const d = Math.hypot(dx, dy) + 0.01;
      nodes[i].dx += (force * dx) / d; nodes[i].dy += (force * dy) / d;
      nodes[j].dx -= (force * dx) / d; nodes[j].dy -= (force * dy) / d;
    }
    for (const { a, b } of edges) {
      const dx = b.x - a.x, dy = b.y - a.y;
      a.dx += 0.03 * dx; a.dy += 0.03 * dy; b.dx -= 0.03 * dx; b.dy -= 0.03 * dy;
    }
    for (const node of nodes) {
      const length = Math.hypot(node.dx, node.dy) + 0.01;
      node.x = Math.min(600, Math.max(40, node.x + (node.dx / length) * Math.min(length, heat)));
      node.y = Math.min(400, Math.max(20, node.y + (node.dy / length) * Math.min(length, heat)));
    }
  }
}

function draw({ nodes, edges }) {
  const labels = [...new Set(nodes.map((node) => node.label))].sort();
  const colour = (label) => `hsl(${(360 * labels.indexOf(label)) / labels.length} 65% 50%)`;
  const shapes = [element("defs", {})];
  const tip = element("marker", { id: "tip", viewBox: "0 0 8 8", refX: 16, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  tip.append(element("path", { d: "M0 0 L8 4 L0 8 z", fill: "currentColor" }));
  shapes[0].append(tip);
  for (const { a, b, label } of edges) {
    const line = element("line", { x1: a.x, y1: a.y, x2: b.x, y2: b.y, stroke: "currentColor", "stroke-opacity": 0.5 });
    line.setAttribute(label ? "marker-end" : "stroke-dasharray", label ? "url(#tip)" : "3 3");
    shapes.push(line);
    if (label) shapes.push(element("text",
      { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, "font-size": 9, "text-anchor": "middle", fill: "currentColor", opacity: 0.8 }, label));
  }
  for (const node of nodes) {
    const dot = element("g", { class: "node", tabindex: 0 });
    dot.append(
      element("circle", { cx: node.x, cy: node.y, r: 5 + Math.min(9, Math.sqrt(node.mentions.length)), fill: colour(node.label) }),
      element("text", { x: node.x, y: node.y - 10, "font-size": 11, "text-anchor": "middle", fill: "currentColor" },
        node.name.length > 28 ? `${node.name.slice(0, 27)}…` : node.name),
      element("title", {}, `${node.label}, ${node.mentions.length} times`),
    );
    const tell = () => $("mentions").replaceChildren(
      make("p", `${node.name} (${node.label}): characters ${node.mentions.map((m) => `${m.start}–${m.end}`).join(", ")}`));
    dot.addEventListener("click", tell);
    dot.addEventListener("keydown", (event) => { if (event.key === "Enter") tell(); });
    shapes.push(dot);
  }
  $("graph").replaceChildren(...shapes);
  $("graph").removeAttribute("hidden");
}

async function extract() {
  const [found] = (await (await post("/v1/extract", { input: await content() })).json()).data;
  const graph = network(found);
  arrange(graph);
  draw(graph);
  $("mentions").replaceChildren();
  const links = found.relations?.length ? `${found.relations.length} relations` : "no relations; dashed: near each other";
  const shown = graph.nodes.length < graph.all ? `, the ${graph.nodes.length} most frequent are shown` : "";
  $("found").textContent = `${found.entities.length} mentions of ${graph.all} entities${shown}; ${links}`;
}

on("connect", connect);
on("read", read);
on("cancel", async () => reading?.abort());
on("continue", write);
on("stop", async () => writing?.abort());
on("classify", classify);
on("extract", extract);
document.querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); $("connect").click(); });
$("file").addEventListener("change", () => { $("text").disabled = Boolean($("file").files.length); });
// A page that a browser keeps for the way back would keep its requests, and the server would work on.
addEventListener("pagehide", () => { reading?.abort(); writing?.abort(); });
// Without keys there is nothing to type.
call("/v1/models").then(connect).catch(() => say("type a key of this server, then connect"));
