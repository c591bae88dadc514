"use strict";
(() => {
  const data = JSON.parse(document.getElementById("replay-data").textContent);
  const root = document.getElementById("replay");
  // Of several decodings two are seen, side by side: `seen` has their indices, `moments` for each moment their frames.
  let seen = data.runs.map((_, index) => index).slice(0, 2), moments = [], last = 0;
  const MARKS = { accepted: "✓", rejected: "✕", renoised: "↺", revised: "✎" };
  const STATES = { given: "prompt", ar: "autoregressive", draft: "draft", committed: "committed" };
  const EVENTS = {
    prompt: "Prompt", noise: "Block of noise", denoise: "Denoising step", propose: "Clean proposal",
    correct: "Unlikely tokens return to noise", commit: "Block committed", ar: "One token, autoregressively",
    draft: "Draft", verify: "Draft verified", revise: "Least certain tokens return to noise", end: "End",
  };
  const STEP = 420; // milliseconds at normal speed
  let now = 0, timer = null, picked = null;

  // All texts go through here: a token is never markup.
  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "circle", "rect", "text"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const frameOf = (run, moment) => data.runs[run].frames[moments[moment][seen.indexOf(run)]];
  const cellOf = (run, moment, index) => data.runs[run].cells[frameOf(run, moment).positions[index]];

  // Aligned by cost: at each number of function evaluations as many moments as the run with the most frames has there.
  function align() {
    const byCost = seen.map((run) => {
      const found = new Map();
      data.runs[run].frames.forEach((frame, index) => {
        const cost = frame.function_evaluations;
        found.set(cost, [...(found.get(cost) || []), index]);
      });
      return found;
    });
    const costs = [...new Set(byCost.flatMap((found) => [...found.keys()]))].sort((a, b) => a - b);
    let frames = seen.map(() => 0);
    moments = [];
    for (const cost of costs) {
      const here = byCost.map((found) => found.get(cost) || []);
      for (let number = 0; number < Math.max(...here.map((found) => found.length)); number += 1) {
        frames = here.map((found, place) => found.length ? found[Math.min(number, found.length - 1)] : frames[place]);
        moments.push(frames);
      }
    }
    last = moments.length - 1;
  }
  const isMask = (run, cell) => cell.noise && cell.token === data.runs[run].mask_token;
  const quoted = (text) => "“" + text.replace(/\n/g, "⏎") + "”";
  function shown(run, cell) {
    if (isMask(run, cell)) return "░";
    return cell.text.replace(/^ /, "").replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || (cell.text ? "␣" : "·");
  }
  function perForward(frame) {
    return frame.function_evaluations ? (frame.new_tokens / frame.function_evaluations).toFixed(2) : "–";
  }
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

  // the page
  const runBoxes = data.runs.map((run, index) => {
    const what = make("p", { class: "what" });
    const text = make("div", { class: "text", role: "group", "aria-label": `Text, ${run.label}. Arrow keys move between tokens.` });
    const cost = make("p", { class: "cost" });
    const header = make("header", {}, make("h2", {}, run.label), make("span", { class: "details" }, run.details));
    const box = make("section", { class: "run", "aria-label": run.label }, header, what, text, cost);
    text.addEventListener("keydown", (event) => moveFocus(event, index));
    return { box, what, text, cost, tokens: [] };
  });
  const runs = make("div", { class: "runs" });
  const choices = make("div", { class: "choices" });
  if (data.runs.length > 2) {
    ["Compare", "with"].forEach((word, place) => {
      const select = make("select", {}, ...data.runs.map((run, index) => make("option", { value: index }, `${run.label} (${run.details || "no settings"})`)));
      select.value = String(seen[place]);
      select.addEventListener("change", () => {
        seen[place] = Number(select.value);
        seen = seen[0] === seen[1] ? [seen[place]] : seen.length === 1 ? [...choices.querySelectorAll("select")].map((found) => Number(found.value)) : seen;
        show();
      });
      choices.append(make("label", {}, `${word} `, select));
    });
  }

  const buttons = {};
  function button(name, sign, label, action) {
    buttons[name] = make("button", { type: "button", "aria-label": label, title: label }, sign);
    buttons[name].addEventListener("click", action);
    return buttons[name];
  }
  const scrubber = make("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Step" });
  const where = make("span", { class: "where" });
  const speed = make("select", { "aria-label": "Speed" },
    ...[["0.5", "0.5×"], ["1", "1×"], ["2", "2×"], ["4", "4×"]].map(([value, label]) => make("option", { value }, label)));
  speed.value = "1";
  const bars = make("input", { type: "checkbox", id: "replay-bars", checked: "" });
  const controls = make("div", { class: "controls", role: "group", "aria-label": "Replay" },
    scrubber,
    make("div", { class: "buttons" },
      button("first", "|◀", "First step (Home)", () => seek(0)),
      button("back", "◀", "One step back (left arrow)", () => seek(now - 1)),
      button("play", "▶ Play", "Play (space)", toggle),
      button("forward", "▶", "One step forward (right arrow)", () => seek(now + 1)),
      button("last", "▶|", "Last step (End)", () => seek(last)),
      speed, make("label", { for: "replay-bars" }, bars, " surprisal"), where));
  buttons.play.classList.add("play");

  const about = make("section", { class: "panel", "aria-label": "Token" });
  const chart = make("svg", { class: "chart", viewBox: "0 0 420 210", "aria-hidden": "true" });
  const costs = make("section", { class: "panel", "aria-label": "Cost" }, make("h2", {}, "Cost"), chart);
  const live = make("p", { class: "silent", role: "status", "aria-live": "polite" });
  root.append(choices, runs, controls, make("div", { class: "below" }, about, costs), legend(), live);

  function legend() {
    const item = (classes, sign, text, mark) => {
      const token = make("span", { class: `token ${classes}`, "aria-hidden": "true" }, sign);
      if (mark) token.append(make("span", { class: "mark" }, mark));
      return make("li", {}, token, text);
    };
    const used = new Set(), cells = data.runs.flatMap((run) => run.cells);
    cells.forEach((cell) => { used.add(cell.noise ? "noise" : cell.state); used.add(cell.mark); });
    const items = [
      ["given", item("given", "word", "prompt")], ["noise", item("noise", "░", "noise")],
      ["draft", item("draft", "word", "draft")], ["ar", item("ar", "word", "autoregressive")],
      ["committed", item("committed", "word", "committed")],
      ["accepted", item("committed accepted", "word", "draft accepted", "✓")],
      ["rejected", item("draft rejected", "word", "draft rejected", "✕")],
      ["renoised", item("noise renoised", "░", "returned to noise", "↺")],
      ["revised", item("noise revised", "░", "revised", "✎")],
    ].filter(([name]) => used.has(name)).map(([, element]) => element);
    if (cells.some((cell) => cell.renoised)) {
      const times = make("span", { class: "token committed", "aria-hidden": "true" }, "word", make("span", { class: "times" }, "2"));
      items.push(make("li", {}, times, "times re-noised"));
    }
    return make("ul", { class: "legend", "aria-label": "Legend" }, ...items);
  }

  // tokens
  function describe(run, cell) {
    const words = [isMask(run, cell) ? "mask" : quoted(cell.text), cell.noise ? "noise" : STATES[cell.state]];
    if (cell.mark) words.push(cell.mark);
    if (cell.was) words.push(`was ${quoted(cell.was.text)}`);
    if (cell.renoised) words.push(`re-noised ${count(cell.renoised, "time")}`);
    if (cell.surprisal != null) words.push(`surprisal ${cell.surprisal.toFixed(2)} nats`);
    return words.join(", ");
  }
  function drawText(run) {
    const view = runBoxes[run], frame = frameOf(run, now), source = data.runs[run];
    const before = now > 0 ? frameOf(run, now - 1) : null, end = source.frames[source.frames.length - 1];
    const cells = frame.positions.map((number) => source.cells[number]);
    while (view.tokens.length > cells.length) view.tokens.pop().remove();
    while (view.tokens.length < cells.length) {
      const index = view.tokens.length, token = make("button", { type: "button" });
      token.addEventListener("mouseenter", () => pick(run, index, false));
      token.addEventListener("focus", () => pick(run, index, false));
      token.addEventListener("click", () => pick(run, index, true));
      view.tokens.push(token);
      view.text.append(token);
    }
    cells.forEach((cell, index) => {
      const token = view.tokens[index], old = before && before !== frame ? source.cells[before.positions[index]] : cell;
      const isFresh = !old || old.token !== cell.token || Boolean(old.noise) !== Boolean(cell.noise);
      const classes = ["token", cell.state];
      if (cell.noise) classes.push("noise");
      if (cell.mark) classes.push(cell.mark);
      if (cell.text.startsWith(" ") || (isMask(run, cell) && index > 0)) classes.push("space");
      if (isFresh && frame.event !== "noise" && frame.event !== "prompt" && cell.state !== "given") classes.push("fresh");
      token.className = classes.join(" ");
      token.tabIndex = (picked && picked.run === run ? picked.index : 0) === index ? 0 : -1;
      token.setAttribute("aria-label", describe(run, cell));
      token.setAttribute("aria-pressed", String(Boolean(picked && picked.pinned && picked.run === run && picked.index === index)));
      token.replaceChildren(shown(run, cell));
      // As wide as at the end, so that the lines do not move more than they must.
      const final = end.positions.length > index ? source.cells[end.positions[index]] : cell;
      token.style.minWidth = cell.state === "given" ? "0" : `${Math.min(12, shown(run, final).length) * 0.52 + 0.5}em`;
      if (cell.renoised && !cell.noise) token.append(make("span", { class: "times" }, String(cell.renoised)));
      if (cell.mark) token.append(make("span", { class: "mark", "aria-hidden": "true" }, MARKS[cell.mark]));
      if (bars.checked && cell.surprisal != null) {
        token.append(make("span", { class: "surprise", style: `width:${Math.min(100, 10 * cell.surprisal)}%` }));
      }
      if (cell.text.includes("\n") && !cell.noise) token.after(...(token.nextSibling?.tagName === "BR" ? [] : [make("br")]));
      else if (token.nextSibling?.tagName === "BR") token.nextSibling.remove();
    });
    while (view.text.lastChild && view.text.lastChild.tagName === "BR") view.text.lastChild.remove();
    const place = source.decoding === "ar" ? `token ${frame.new_tokens}`
      : `${source.decoding === "speculative" ? "round" : "block"} ${frame.block + 1}, step ${frame.step}`;
    view.what.textContent = ["prompt", "end"].includes(frame.event) ? EVENTS[frame.event] : `${EVENTS[frame.event]} · ${place}`;
    const extra = now === last ? Object.entries(source.facts).map(([unit, value]) => ` · ${value} ${unit}`).join("") : "";
    view.cost.replaceChildren(make("b", {}, String(frame.function_evaluations)),
      ` function evaluation${frame.function_evaluations === 1 ? "" : "s"} · `, make("b", {}, String(frame.new_tokens)),
      ` new token${frame.new_tokens === 1 ? "" : "s"} · `, make("b", {}, perForward(frame)), ` per forward${extra}`);
  }
  function moveFocus(event, run) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8 }[event.key];
    if (!step || event.target.tagName !== "BUTTON") return;
    event.preventDefault();
    event.stopPropagation();
    const tokens = runBoxes[run].tokens, next = tokens.indexOf(event.target) + step;
    tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
  }

  // the token that is looked at
  function pick(run, index, pin) {
    if (!pin && picked && picked.pinned) return;
    const again = pin && picked && picked.pinned && picked.run === run && picked.index === index;
    picked = { run, index, pinned: pin && !again };
    runBoxes.forEach((view, other) => view.tokens.forEach((token, place) => {
      const isHere = other === run && place === index;
      if (other === run) token.tabIndex = isHere ? 0 : -1;
      token.setAttribute("aria-pressed", String(isHere && picked.pinned));
    }));
    drawAbout();
  }
  function drawAbout() {
    const title = make("h2", {}, "Token");
    const cell = picked && picked.index < frameOf(picked.run, now).positions.length ? cellOf(picked.run, now, picked.index) : null;
    if (!cell) {
      about.replaceChildren(title, make("p", {}, "Point at a token, or move to it with Tab and the arrow keys, to see what the model thought of it. A click keeps it."));
      return;
    }
    const line = (name, value) => make("p", {}, make("b", {}, `${name}: `), value);
    const state = [cell.noise ? "noise" : STATES[cell.state], cell.mark].filter(Boolean).join(", ");
    const lines = [line("Text", isMask(picked.run, cell) ? "mask" : quoted(cell.text)), line("State", state)];
    if (cell.was) {
      const judged = cell.was.surprisal != null ? ` (surprisal ${cell.was.surprisal.toFixed(2)} nats)` : "";
      lines.push(line("Was", quoted(cell.was.text) + judged));
    }
    if (cell.renoised) lines.push(line("Re-noised", count(cell.renoised, "time")));
    if (cell.surprisal != null) lines.push(line("AR surprisal", `${cell.surprisal.toFixed(2)} nats`));
    const lists = [["Diffusion", cell.diffusion], ["Autoregressive", cell.ar]].filter(([, list]) => list);
    if (lists.length) lines.push(make("div", { class: "likely" }, ...lists.map(([name, list]) => likely(name, list, cell))));
    about.replaceChildren(title, ...lines);
  }
  function likely(name, list, cell) {
    const items = list.map((entry) => make("li", { class: entry.token === cell.token && !cell.noise ? "chosen" : "" },
      make("code", {}, quoted(entry.text)), make("span", {}, `${(100 * entry.probability).toFixed(1)} %`),
      make("span", { class: "bar", style: `width:${100 * entry.probability}%` })));
    return make("div", {}, make("h3", {}, name), make("ol", {}, ...items));
  }

  // cost: new tokens against function evaluations
  const DASHES = ["", "7 4"];
  let mostCost = 1, mostTokens = 1, dots = [];
  const x = (cost) => 34 + 370 * cost / mostCost, y = (tokens) => 170 - 150 * tokens / mostTokens;
  const cursor = make("line", { class: "now", y1: 14, y2: 170 });
  function drawChart() {
    const frames = seen.flatMap((run) => data.runs[run].frames);
    mostCost = Math.max(1, ...frames.map((frame) => frame.function_evaluations));
    mostTokens = Math.max(1, ...frames.map((frame) => frame.new_tokens));
    const label = (text, left, top, anchor) => make("text", { x: left, y: top, "text-anchor": anchor }, text);
    const curves = seen.flatMap((run, place) => {
      const dashes = { class: "curve", "stroke-dasharray": DASHES[place] };
      const path = data.runs[run].frames.map((frame, index) => `${index ? "L" : "M"}${x(frame.function_evaluations)} ${y(frame.new_tokens)}`).join("");
      const top = 130 + 18 * place, name = [make("path", { ...dashes, d: `M246 ${top}h28` }), label(data.runs[run].label, 280, top + 4, "start")];
      return [make("path", { ...dashes, d: path }), ...(seen.length > 1 ? name : [])];
    });
    dots = seen.map((_, place) => place ? make("rect", { class: "dot", width: 9, height: 9 }) : make("circle", { class: "dot", r: 5 }));
    chart.replaceChildren(make("path", { class: "axis", d: "M34 14V170H404" }), label("0", 34, 186, "middle"),
      label(String(mostCost), 404, 186, "end"), label("function evaluations", 219, 202, "middle"),
      label(String(mostTokens), 30, 24, "end"), label("new tokens", 38, 12, "start"), ...curves, cursor, ...dots);
  }
  function seekTo(event) {
    const box = chart.getBoundingClientRect(), cost = ((event.clientX - box.left) * 420 / box.width - 34) / 370 * mostCost;
    let best = 0;
    moments.forEach((_, moment) => { if (costAt(moment) <= cost) best = moment; });
    seek(best);
  }
  chart.addEventListener("pointerdown", (event) => { chart.setPointerCapture(event.pointerId); seekTo(event); });
  chart.addEventListener("pointermove", (event) => { if (event.buttons) seekTo(event); });
  const costAt = (moment) => Math.max(...seen.map((run) => frameOf(run, moment).function_evaluations));
  function drawNow() {
    const cost = x(costAt(now));
    cursor.setAttribute("x1", cost);
    cursor.setAttribute("x2", cost);
    seen.forEach((run, place) => {
      const frame = frameOf(run, now), left = x(frame.function_evaluations), top = y(frame.new_tokens);
      const where = place ? { x: left - 4.5, y: top - 4.5 } : { cx: left, cy: top };
      for (const [name, value] of Object.entries(where)) dots[place].setAttribute(name, value);
    });
  }

  // time
  function summary() {
    return seen.map((index) => {
      const frame = frameOf(index, now), name = seen.length > 1 ? `${data.runs[index].label}: ` : "";
      return `${name}${runBoxes[index].what.textContent}, ${count(frame.function_evaluations, "function evaluation")}, ${count(frame.new_tokens, "new token")}`;
    }).join(". ");
  }
  function draw() {
    seen.forEach(drawText);
    drawAbout();
    drawNow();
    scrubber.value = String(now);
    scrubber.setAttribute("aria-valuetext", `Step ${now + 1} of ${last + 1}. ${summary()}`);
    where.textContent = `step ${now + 1} of ${last + 1}`;
    buttons.first.disabled = buttons.back.disabled = now === 0;
    buttons.last.disabled = buttons.forward.disabled = now === last;
    buttons.play.textContent = timer ? "❚❚ Pause" : "▶ Play";
    buttons.play.setAttribute("aria-label", timer ? "Pause (space)" : "Play (space)");
    buttons.play.title = buttons.play.getAttribute("aria-label");
    // Every step of a running replay would be too much to listen to.
    if (!timer) live.textContent = `Step ${now + 1} of ${last + 1}. ${summary()}`;
  }
  function stop() {
    clearTimeout(timer);
    timer = null;
  }
  function seek(moment) {
    stop();
    now = Math.max(0, Math.min(last, moment));
    draw();
  }
  function tick() {
    if (now >= last) { stop(); draw(); return; }
    now += 1;
    timer = setTimeout(tick, STEP / Number(speed.value));
    draw();
  }
  function toggle() {
    if (timer) { stop(); draw(); return; }
    if (now === last) now = 0;
    timer = setTimeout(tick, STEP / Number(speed.value));
    draw();
  }
  scrubber.addEventListener("input", () => seek(Number(scrubber.value)));
  bars.addEventListener("change", draw);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === scrubber || event.target === speed) return;
    const isButton = ["BUTTON", "INPUT"].includes(event.target.tagName);
    const action = {
      ArrowLeft: () => seek(now - 1), ArrowRight: () => seek(now + 1), Home: () => seek(0), End: () => seek(last),
      ...(isButton ? {} : { " ": toggle }),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  // Shows the chosen decodings, at their end.
  function show() {
    stop();
    align();
    now = last;
    picked = null;
    scrubber.max = String(last);
    runs.className = seen.length === 2 ? "runs two" : "runs";
    runs.replaceChildren(...seen.map((run) => runBoxes[run].box));
    drawChart();
    draw();
  }
  show();
  // In a frame of another page: how high it has to be.
  if (window.parent !== window) {
    new ResizeObserver(() => window.parent.postMessage({ replayHeight: root.offsetHeight }, "*")).observe(root);
  }
})();
