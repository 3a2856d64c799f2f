// The sketch pad, dropped and pasted photos, and actions sent to the server, which renders the regions of the page.

const $ = (id) => document.getElementById(id);
const MISTAKE = "Invalid response; reload the page.";
const SILENCE = "No response from the server; is union-demo still running?";
const GRID = 1000, PEN = 28, NEAR = 4, ERASER = 45;

// ---- the sketch pad -------------------------------------------------------------------------

const canvas = document.querySelector("#pad canvas");
const paper = canvas.getContext("2d");
let strokes = [];
let before = []; // the strokes before each change, for undo
let erasing = false;
let erased = null; // the eraser's last position
let pen = { x: GRID / 2, y: GRID / 2, down: false, keys: false };

function paint() {
  paper.clearRect(0, 0, GRID, GRID);
  paper.lineWidth = PEN;
  paper.lineCap = paper.lineJoin = "round";
  paper.strokeStyle = "#181818";
  for (const stroke of strokes) {
    paper.beginPath();
    paper.moveTo(...stroke[0]);
    for (const point of stroke) paper.lineTo(...point);
    paper.stroke();
  }
  if (pen.keys) {
    paper.lineWidth = 4;
    paper.strokeStyle = pen.down ? "#c2255c" : "#2f4fc4";
    paper.beginPath();
    paper.arc(pen.x, pen.y, PEN, 0, 2 * Math.PI);
    paper.stroke();
  }
  $("pad-empty").hidden = strokes.length > 0;
  $("clear").disabled = strokes.length === 0;
  $("unstroke").disabled = before.length === 0;
  if (!strokes.length && erasing) erase(false);
  $("eraser").disabled = strokes.length === 0;
}

function remember() {
  before.push(strokes.map((stroke) => [...stroke]));
  if (before.length > 100) before.shift();
}

function erase(on) {
  erasing = on;
  $("eraser").setAttribute("aria-pressed", String(on));
  canvas.classList.toggle("erasing", on);
}

function eraseTo([x, y]) {
  const [fromX, fromY] = erased ?? [x, y];
  const steps = Math.ceil((2 * Math.hypot(x - fromX, y - fromY)) / ERASER) || 1;
  for (let at = 1; at <= steps; at++) eraseAt([fromX + ((x - fromX) * at) / steps, fromY + ((y - fromY) * at) / steps]);
  erased = [x, y];
}

// Remove the ink near a point; a stroke may fall apart into several.
function eraseAt([x, y]) {
  const near = ([px, py]) => Math.hypot(px - x, py - y) < ERASER;
  strokes = strokes.flatMap((stroke) => {
    const pieces = [[]];
    stroke.forEach((point, at) => {
      for (const one of at ? between(stroke[at - 1], point, [x, y]) : [point])
        if (near(one)) pieces.push([]);
        else pieces.at(-1).push(one);
    });
    return pieces.filter((piece) => piece.length);
  });
}

// The points after the first of a segment: its end, and where it passes the eraser some points between.
function between([ax, ay], [bx, by], [x, y]) {
  const [dx, dy] = [bx - ax, by - ay];
  const length = Math.hypot(dx, dy);
  const along = length ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / length ** 2)) : 0;
  if (Math.hypot(ax + along * dx - x, ay + along * dy - y) >= ERASER) return [[bx, by]];
  const steps = Math.max(1, Math.ceil(length / 10));
  return Array.from({ length: steps }, (_, at) => [ax + (dx * (at + 1)) / steps, ay + (dy * (at + 1)) / steps].map(Math.round));
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const at = (value, low, size) => Math.max(0, Math.min(GRID, Math.round(((value - low) / size) * GRID)));
  return [at(event.clientX, box.left, box.width), at(event.clientY, box.top, box.height)];
}

function draw(point) {
  if (erasing) return eraseTo(point);
  const stroke = strokes.at(-1);
  if (!stroke) return;
  const [x, y] = stroke.at(-1);
  if (Math.hypot(point[0] - x, point[1] - y) >= NEAR) stroke.push(point);
}

let drawing = null; // the pointer that draws
canvas.addEventListener("pointerdown", (event) => {
  if (drawing !== null || event.button !== 0) return;
  drawing = event.pointerId;
  canvas.setPointerCapture(drawing);
  pen.keys = false;
  remember();
  erased = null;
  if (erasing) eraseTo(place(event));
  else strokes.push([place(event)]);
  paint();
});
canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== drawing) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const one of events.length ? events : [event]) draw(place(one));
  paint();
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, (event) => {
    if (event.pointerId === drawing) drawing = null;
  });

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
  if (event.key === " ") {
    pen.down = !pen.down;
    if (pen.down) {
      remember();
      erased = null;
      if (erasing) eraseTo([pen.x, pen.y]);
      else strokes.push([[pen.x, pen.y]]);
    }
    $("message").textContent = pen.down ? "Pen down." : "Pen up.";
  } else if (event.key in ARROWS) {
    const step = event.shiftKey ? 5 : 25;
    const [x, y] = ARROWS[event.key];
    pen.x = Math.max(0, Math.min(GRID, pen.x + step * x));
    pen.y = Math.max(0, Math.min(GRID, pen.y + step * y));
    if (pen.down) draw([pen.x, pen.y]);
  } else return;
  event.preventDefault();
  pen.keys = true;
  paint();
});
canvas.addEventListener("blur", () => {
  pen.keys = pen.down = false;
  paint();
});
$("unstroke").addEventListener("click", () => {
  strokes = before.pop() ?? [];
  pen.down = false;
  paint();
  if (!strokes.length) canvas.focus();
});
$("eraser").addEventListener("click", () => erase(!erasing));
$("clear").addEventListener("click", () => {
  remember();
  strokes = [];
  pen.down = false;
  paint();
  canvas.focus();
});

// ---- a rectangle on the query image ------------------------------------------------------------

// The place of a pointer on the query image, in thousandths of its sides.
function placeOn(image, event) {
  const box = image.getBoundingClientRect();
  const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const at = (value, low, size, natural) => (value - low - (size - natural * scale) / 2) / (natural * scale);
  const x = at(event.clientX, box.left, box.width, image.naturalWidth);
  const y = at(event.clientY, box.top, box.height, image.naturalHeight);
  return [x, y].map((one) => Math.max(0, Math.min(GRID, Math.round(one * GRID))));
}

let rectangle = null; // the image, its frame, and the first corner on it and on the window
$("reference").addEventListener("dragstart", (event) => event.preventDefault());
$("reference").addEventListener("pointerdown", (event) => {
  if (!event.target.matches(".square img") || event.button !== 0) return;
  event.preventDefault();
  const frame = event.target.parentElement.appendChild(document.createElement("div"));
  frame.className = "frame";
  rectangle = { image: event.target, frame, corner: placeOn(event.target, event), x: event.clientX, y: event.clientY };
});
addEventListener("pointermove", (event) => {
  if (!rectangle) return;
  const box = rectangle.frame.parentElement.getBoundingClientRect();
  const { style } = rectangle.frame;
  style.left = `${Math.min(rectangle.x, event.clientX) - box.left}px`;
  style.top = `${Math.min(rectangle.y, event.clientY) - box.top}px`;
  style.width = `${Math.abs(event.clientX - rectangle.x)}px`;
  style.height = `${Math.abs(event.clientY - rectangle.y)}px`;
});
for (const end of ["pointerup", "pointercancel"])
  addEventListener(end, (event) => {
    if (!rectangle) return;
    const [[ax, ay], [bx, by]] = [rectangle.corner, placeOn(rectangle.image, event)];
    rectangle.frame.remove();
    rectangle = null;
    const [left, top, right, bottom] = [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
    if (end === "pointerup" && right - left >= 20 && bottom - top >= 20) act("crop", { left, top, right, bottom });
  });

// ---- steps -----------------------------------------------------------------------------------

let waiting = 0; // steps without a response
let turn = Promise.resolve(); // steps are sent one after another
let lastSent = null;

function showProblem(problem) {
  $("loading")?.remove();
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
  if (problem) {
    $("message").textContent = "";
    $("problem").scrollIntoView({ block: "nearest" });
  }
}

function send(address, body) {
  if (waiting && body === lastSent && body.includes?.('"search"')) return Promise.resolve(null); // a double click
  lastSent = body;
  waiting += 1;
  document.body.setAttribute("aria-busy", "true");
  const response = turn.then(() => post(address, body));
  turn = response.then(() => {
    waiting -= 1;
    if (!waiting) document.body.removeAttribute("aria-busy");
  });
  return response;
}

async function post(address, body) {
  try {
    const token = sessionStorage.getItem("union-demo") ?? "new";
    const type = body instanceof Blob ? "application/octet-stream" : "application/json";
    const headers = { "X-Session": token, "Content-Type": type };
    const response = await fetch(address, { method: "POST", headers, body, signal: AbortSignal.timeout(60_000) });
    const shown = await response.json();
    if (shown.problem) showProblem(shown.problem);
    else show(shown);
    return shown.problem ? null : shown;
  } catch (error) {
    showProblem(error instanceof SyntaxError ? MISTAKE : SILENCE);
    return null;
  }
}

const act = (action, given = {}) => send("act", JSON.stringify({ action, given }));

function replace(region, html) {
  const focused = region.contains(document.activeElement) ? document.activeElement.dataset.key ?? "" : null;
  region.innerHTML = html;
  if (focused === null) return;
  const again = focused && region.querySelector(`[data-key="${CSS.escape(focused)}"]:not(:disabled)`);
  if (again) again.focus({ preventScroll: true });
  else if (region.hasAttribute("tabindex")) region.focus({ preventScroll: true });
}

function press(marks) {
  for (const button of document.querySelectorAll('[data-act="mark"]')) {
    const { id, liked } = JSON.parse(button.dataset.given);
    button.setAttribute("aria-pressed", String(marks[id] === liked));
  }
}

function allow(can) {
  const focused = document.activeElement;
  for (const [action, allowed] of Object.entries(can)) document.querySelector(`[data-act="${action}"]`).disabled = !allowed;
  if (focused?.disabled) $("history").focus({ preventScroll: true }); // a disabled button loses it
}

let compared = "";
let reference = "";
let following = true; // the page opens or the browser goes back or forward: the address is not a new one

const link = () => (location.hash.startsWith("#q=") ? location.hash.slice(3) : "");

function show(shown) {
  sessionStorage.setItem("union-demo", shown.token);
  if (shown.link !== link())
    history[following ? "replaceState" : "pushState"](null, "", shown.link ? `#q=${shown.link}` : location.pathname);
  showProblem("");
  $("message").textContent = shown.message;
  if (shown.history !== null) {
    replace($("history"), shown.history);
    $("history").querySelector("[aria-current]")?.closest("li").scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  allow(shown.can);
  if (shown.results !== null) {
    replace($("results"), shown.results);
    $("heading").textContent = shown.heading;
  }
  replace($("marks"), shown.marked);
  $("marks").hidden = shown.marked.trim() === "";
  press(shown.marks);
  const count = Object.keys(shown.marks).length;
  $("bar").hidden = !count || !shown.pending;
  $("bar-search").textContent = `Search with ${count} ${count === 1 ? "mark" : "marks"}`;
  const held = shown.reference.trim() !== "";
  if (shown.reference !== reference) $("reference").innerHTML = reference = shown.reference; // unchanged, its buttons keep the focus
  $("reference").hidden = $("drop").hidden = !held;
  $("pad").hidden = $("unstroke").hidden = $("clear").hidden = held;
  if (shown.text !== null) $("text").value = shown.text;
  if (shown.where !== null && $("where")) {
    $("where").value = shown.where;
    if (shown.where) $("filter").open = true; // an active filter is visible
    folded();
  }
  compared = shown.compared ?? "";
  if ($("compared")) $("compared").value = compared;
  if (shown.strokes !== null) {
    strokes = shown.strokes;
    before = [];
    drawing = null;
    pen.down = false;
    paint();
  }
  if (shown.large !== null) {
    $("large").innerHTML = shown.large;
    if (!$("large").open) $("large").showModal();
  }
}

// A folded filter is still active, so its text stays visible.
const folded = () => ($("filtered").textContent = (!$("filter").open && $("where").value) || "(optional)");
$("filter")?.addEventListener("toggle", folded);

// Search without one of the terms that the text field holds.
document.addEventListener("click", (event) => {
  const removed = event.target.closest("[data-term]")?.dataset.term;
  if (removed === undefined) return;
  const terms = $("text").value.split(";").map((term) => term.trim()).filter(Boolean);
  $("text").value = terms.filter((term, at) => at !== terms.indexOf(removed)).join("; ");
  $("query").requestSubmit();
});

const wide = matchMedia("(min-width: 60rem)");

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-act]");
  if (!button || button.disabled) return;
  const action = button.dataset.act;
  const shown = await act(action, JSON.parse(button.dataset.given ?? "{}"));
  if (action === "pick" && $("large").open) $("large").close();
  if (!shown) return;
  if (action === "pick") {
    $("query").scrollIntoView({ block: "start" });
    if (wide.matches) $("text").focus({ preventScroll: true });
    else $("from").focus({ preventScroll: true });
  } else if (action === "drop") canvas.focus();
  else if (action === "unmark") ($("marks").querySelector("button") ?? $("search")).focus();
  else if (action === "page") $("results").scrollIntoView({ block: "start" });
});

$("query").addEventListener("submit", async (event) => {
  event.preventDefault();
  const found = await act("search", { text: $("text").value, where: $("where")?.value ?? "", strokes: $("pad").hidden ? [] : strokes });
  if (found && !wide.matches) $("past").scrollIntoView({ block: "start" });
});

$("compared")?.addEventListener("change", async () => {
  const chosen = $("compared").value;
  const shown = await act("compare", { compared: chosen === "" ? null : Number(chosen) });
  if (!shown) $("compared").value = compared; // unchanged
});

// ---- photos ----------------------------------------------------------------------------------

async function upload(file) {
  if (!file) return;
  if (file.size > Number(document.body.dataset.bytes))
    return showProblem(`${file.name || "The photo"} is larger than ${document.body.dataset.megabytes} MB; use a smaller file.`);
  await send(`photo?name=${encodeURIComponent(file.name || "pasted photo")}`, file);
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  await upload($("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  const typing = document.activeElement?.matches('input[type="text"]') && event.clipboardData?.getData("text/plain");
  if (event.clipboardData?.files.length && !typing) {
    event.preventDefault();
    upload(event.clipboardData.files[0]);
  }
});
for (const name of ["dragenter", "dragover"])
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  upload(event.dataTransfer.files[0]);
});
$("large").addEventListener("click", (event) => {
  if (event.target === $("large")) $("large").close(); // outside the image
});

paint();
async function follow(action, given) {
  following = true;
  await act(action, given);
  following = false;
}
addEventListener("popstate", () => {
  if (link()) follow("show", { link: link() });
  else if (!location.hash) follow("back", { turn: -1 });
});
follow("show", link() ? { link: link() } : {});
