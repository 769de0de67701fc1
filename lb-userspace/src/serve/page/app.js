// The page of one node: asks the agent every two seconds, and draws what has changed. It writes text, never markup.
"use strict";

const PERIOD = 2000;
const POINTS = 60;
const WARNINGS = new Set(["node_silent", "source_lost", "service_without_task", "service_problem", "task_unreachable",
  "task_refusing", "port_left_to_swarm", "table_filling", "limit_hit", "guard_on", "problem"]);
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const before = { services: new Map(), tasks: new Map(), outcomes: new Map(), at: 0 };
const history = new Map();
const chart = [];
let chosen = "";
let timer = 0;

/** An element with text or children; what comes from the cluster is text always. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function short(number) {
  if (number >= 1e9) return (number / 1e9).toFixed(1) + "G";
  if (number >= 1e6) return (number / 1e6).toFixed(1) + "M";
  if (number >= 1e4) return (number / 1e3).toFixed(1) + "k";
  return number > 0 && number < 10 && !Number.isInteger(number) ? number.toFixed(1) : String(Math.round(number));
}

function ago(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

function rate(kind, name, now, seconds) {
  const known = before[kind].get(name);
  return known === undefined || seconds <= 0 ? 0 : Math.max(0, now - known) / seconds;
}

function verdict(one, now) {
  const words = { serving: "✓ SERVING", degraded: "! DEGRADED", starting: "… STARTING" };
  const shown = byId("verdict");
  const text = words[one.verdict] || one.verdict;
  if (shown.textContent !== text) shown.textContent = text;
  shown.className = `verdict ${one.verdict}`;
  const controller = one.controller ? `process ${one.controller}, up ${ago(now - one.started)}` : "no controller";
  byId("facts").textContent = `${one.interface} · ${one.mode} · ${controller} · from ${one.source || "no source yet"}`;
  byId("problems-section").hidden = one.problems.length === 0;
  byId("problems").replaceChildren(...one.problems.map((text) => element("li", { class: "problem" }, text)));
}

function sparkline(values) {
  const most = Math.max(1, ...values);
  const step = 100 / (POINTS - 1);
  const from = POINTS - values.length;
  const points = values.map((value, at) => `${((from + at) * step).toFixed(1)},${(30 - (value / most) * 28).toFixed(1)}`);
  return drawn("svg", { class: "spark", viewBox: "0 0 100 32", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("polyline", { points: points.join(" ") }));
}

function taskRow(task, most, seconds) {
  const now = rate("tasks", task.name, task.connections, seconds);
  const takes = task.active && task.share > 0;
  const [mark, kind] = task.problem ? ["!", "wrong"] : takes ? ["●", "active"] : ["○", "drain"];
  const said = task.problem || (takes ? "takes new connections" : task.active ? "others come first" : task.state);
  const bar = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("rect", { x: 0, y: 0, height: 10, width: most > 0 ? (now / most) * 100 : 0 }));
  return element("li", { title: `${task.name} on ${task.node}: ${said}` },
    element("span", { class: `state-${kind}`, role: "img", "aria-label": said }, mark),
    element("span", { class: "name" }, task.name), bar,
    element("span", { class: "rate" }, `${short(now)}/s`));
}

function card(service, tasks, seconds) {
  const now = rate("services", service.name, service.connections, seconds);
  const past = history.get(service.name) || [];
  past.push(now);
  if (past.length > POINTS) past.shift();
  history.set(service.name, past);
  const open = tasks.reduce((sum, task) => sum + (task.open_connections || 0), 0);
  const rates = tasks.map((task) => rate("tasks", task.name, task.connections, seconds));
  const most = Math.max(0, ...rates);
  const figure = (name, value) => [element("dt", {}, name), element("dd", {}, value)];
  const left = service.left_to_swarm !== null && service.ports.length === 1;
  const shown = tasks.slice(0, 24);
  return element("article", { class: service.problem ? "card wrong" : "card", "data-service": service.name },
    element("h3", {}, `${service.problem ? "! " : ""}${service.name}`),
    element("p", { class: "ports" }, service.ports.join(", ") || "no port"),
    service.problem ? element("p", { class: "problem" }, service.problem) : null,
    element("dl", {}, ...figure("Tasks", left ? "-" : `${service.active_tasks} of ${service.tasks}`),
      ...figure("New", `${short(now)}/s`), ...figure("Open", short(open)),
      ...figure("Failovers", short(service.failovers)), ...figure("Refused", short(service.refused_connections)),
      ...(service.denied_packets === 0 ? [] : figure("Denied", short(service.denied_packets))),
      ...figure("In all", short(service.connections))),
    sparkline(past),
    element("ul", { class: "tasks", "aria-label": `Tasks of ${service.name}` },
      ...shown.map((task) => taskRow(task, most, seconds))),
    tasks.length > shown.length ? element("p", { class: "hint" }, `and ${tasks.length - shown.length} more`) : null);
}

function services(one, seconds) {
  const wanted = byId("find").value.toLowerCase();
  const of = new Map();
  for (const task of one.tasks) {
    if (!of.has(task.service)) of.set(task.service, []);
    of.get(task.service).push(task);
  }
  const shown = one.services.filter((service) => service.name.toLowerCase().includes(wanted));
  // Those that need a look come first.
  shown.sort((a, b) => Number(b.problem !== null) - Number(a.problem !== null));
  byId("services").replaceChildren(...shown.slice(0, 200).map((service) => card(service, of.get(service.name) || [], seconds)));
  byId("services-none").hidden = one.services.length > 0;
}

function nodes(one) {
  const words = { yes: "answers", silent: "SILENT", none: "no agent" };
  byId("nodes").replaceChildren(...one.nodes.map((node) => element("tr", {},
    element("th", { scope: "row" }, node.name + (node.this ? " (this one)" : "")),
    element("td", {}, node.addresses.join(", ")),
    element("td", { class: node.agent === "silent" ? "bad" : "good" },
      (node.agent === "silent" ? "✗ " : node.agent === "yes" ? "✓ " : "– ") + (node.this ? "this one" : words[node.agent])),
    element("td", {}, String(node.tasks)), element("td", {}, node.problem || ""))));
}

function outcomes(one, seconds) {
  const sums = { forwarded: 0, passed: 0, dropped: 0 };
  const rows = one.outcomes.map((outcome) => {
    const now = rate("outcomes", outcome.name, outcome.packets, seconds);
    const kind = outcome.forwarded ? "forwarded" : outcome.dropped ? "dropped" : "passed";
    sums[kind] += now;
    return { outcome, now, kind };
  });
  rows.sort((a, b) => b.now - a.now || b.outcome.packets - a.outcome.packets);
  byId("outcomes").replaceChildren(...rows.map(({ outcome, now, kind }) => element("tr", {},
    element("th", { scope: "row", class: kind === "dropped" ? "bad" : null }, (kind === "dropped" ? "✗ " : "") + outcome.name),
    element("td", { class: "number" }, short(now)), element("td", { class: "number" }, short(outcome.packets)),
    element("td", {}, outcome.help))));
  chart.push(sums);
  if (chart.length > POINTS) chart.shift();
  area();
}

function area() {
  const most = Math.max(1, ...chart.map((sums) => sums.forwarded + sums.passed + sums.dropped));
  const width = 600 / POINTS;
  const from = POINTS - chart.length;
  const bars = [];
  chart.forEach((sums, at) => {
    let y = 140;
    for (const kind of ["forwarded", "passed", "dropped"]) {
      const height = (sums[kind] / most) * 130;
      y -= height;
      bars.push(drawn("rect", { class: kind, x: (from + at) * width, y, width: width * 0.9, height }));
    }
  });
  byId("chart").replaceChildren(byId("chart-title"), ...bars);
  byId("scale").textContent = `· highest ${short(most)} a second`;
}

function fills(one) {
  byId("fills").replaceChildren(...Object.entries(one.fills).map(([table, [entries, room]]) => element("div", { class: "fill" },
    element("span", {}, table),
    element("meter", { min: 0, max: room, high: room * 0.9, value: entries, "aria-label": table }, ""),
    element("span", { class: "number" }, `${short(entries)} of ${short(room)}`))));
}

function events(list) {
  byId("events").replaceChildren(...list.slice(-50).reverse().map((event) => {
    const time = new Date(event.time);
    const warning = WARNINGS.has(event.kind);
    return element("li", { class: warning ? "problem" : null, title: event.kind },
      element("time", { datetime: time.toISOString() }, time.toLocaleTimeString([], { hour12: false })),
      element("span", { role: "img", "aria-label": warning ? "warning" : "information" }, warning ? "!" : "·"),
      element("span", { class: "text" }, event.text));
  }));
}

function remember(one, at) {
  before.services = new Map(one.services.map((service) => [service.name, service.connections]));
  before.tasks = new Map(one.tasks.map((task) => [task.name, task.connections]));
  before.outcomes = new Map(one.outcomes.map((outcome) => [outcome.name, outcome.packets]));
  before.at = at;
}

function choose(interfaces) {
  const names = interfaces.map((one) => one.interface);
  const list = byId("interface");
  byId("interface-choice").hidden = names.length < 2;
  if (list.childElementCount !== names.length) {
    list.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  }
  if (!names.includes(chosen)) chosen = names[0] || "";
  return interfaces.find((one) => one.interface === chosen);
}

function lost(reason) {
  byId("verdict").textContent = "✗ NO ANSWER";
  byId("verdict").className = "verdict lost";
  byId("facts").textContent = reason;
}

async function ask(path) {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

async function look() {
  try {
    const [overview, happened] = await Promise.all([ask("api/v1/overview"), ask("api/v1/events?last=50")]);
    const one = choose(overview.interfaces);
    if (one === undefined) return lost("no interface is served");
    if (one.error) return lost(one.error);
    const at = performance.now();
    const seconds = before.at === 0 ? 0 : (at - before.at) / 1000;
    verdict(one, overview.now);
    services(one, seconds);
    nodes(one);
    outcomes(one, seconds);
    fills(one);
    events(happened.events);
    remember(one, at);
    byId("updated").textContent = `updated ${new Date().toLocaleTimeString([], { hour12: false })}`;
    document.body.dataset.looks = String(Number(document.body.dataset.looks || 0) + 1);
  } catch (error) {
    lost(String(error.message || error));
  }
}

const ENDS = { forwarded: "✓ forwarded", passed: "→ passed to the host", dropped: "✗ dropped" };

/** Draws the path of a packet, step by step. */
function path(one) {
  const said = byId("explain-verdict");
  said.className = one.verdict;
  said.textContent = `${ENDS[one.verdict]}${one.outcome ? ` (${one.outcome}: ${one.meaning})` : ""}${one.next ? ` Next: ${one.next}` : ""}`;
  byId("explain-steps").replaceChildren(...one.steps.map((told) => element("li", { class: told.step === "end" ? `end ${one.verdict}` : null },
    element("span", { class: "step" }, told.step),
    element("span", { class: "text" }, told.text))));
}

async function explain(event) {
  event.preventDefault();
  const button = event.target.querySelector("button");
  const said = byId("explain-verdict");
  const asked = new URLSearchParams({
    protocol: byId("explain-protocol").value,
    client: byId("explain-client").value.trim(),
    listener: byId("explain-listener").value.trim(),
  });
  button.disabled = true;
  said.className = "";
  said.textContent = "The kernel verifies the program…";
  byId("explain-steps").replaceChildren();
  try {
    path((await ask(`api/v1/explain?${asked}`)).explanation);
  } catch (error) {
    said.className = "dropped";
    said.textContent = String(error.message || error).replace(/^api[^:]*: \d+ /, "");
  } finally {
    button.disabled = false;
  }
}

/** Asks again while somebody looks. */
function plan() {
  clearTimeout(timer);
  if (byId("pause").checked || document.hidden) return;
  timer = setTimeout(async () => { await look(); plan(); }, PERIOD);
}

byId("pause").addEventListener("change", plan);
document.addEventListener("visibilitychange", plan);
byId("find").addEventListener("input", look);
byId("interface").addEventListener("change", (event) => {
  chosen = event.target.value;
  Object.assign(before, { services: new Map(), tasks: new Map(), outcomes: new Map(), at: 0 });
  history.clear();
  chart.length = 0;
  look();
});
byId("explain").addEventListener("submit", explain);
look().then(plan);
