"use strict";
const $ = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const D = JSON.parse($("data").textContent);
const COLOURS = bytes(D.colours), [H, W] = D.size, C = D.classes.length, SIDE = 320;
const state = { image: 0, label: 0 };

const maps = D.images.map(im => im.runs.map(run => new Int8Array(bytes(run.maps).buffer)));
const pictures = D.images.map(im => {
  if (!im.picture) return null;
  const picture = new Image();
  picture.src = im.picture;
  return picture;
});

// ---- Values and colours

const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const at = (run, y, x) => maps[state.image][run][(state.label * H + y) * W + x] * D.step;

// The map of a run at v down and u across, both in 0..1; positions are areas, as in the figures
function value(run, v, u) {
  if (!$("smooth").checked) return at(run, Math.min(H - 1, Math.floor(v * H)), Math.min(W - 1, Math.floor(u * W)));
  const y = clamp(v * H - .5, 0, H - 1), x = clamp(u * W - .5, 0, W - 1);
  const i = Math.floor(y), j = Math.floor(x), a = y - i, b = x - j;
  const k = Math.min(i + 1, H - 1), l = Math.min(j + 1, W - 1);
  return (1 - a) * ((1 - b) * at(run, i, j) + b * at(run, i, l)) + a * ((1 - b) * at(run, k, j) + b * at(run, k, l));
}

// The map value of full colour: of all maps, or the largest magnitude of this label's
function limit() {
  if (!$("own").checked) return D.limit;
  let top = 0;
  D.runs.forEach((_, run) => {
    for (let y = 0; y < H; y++) for (let x = 0; x < W; x++) top = Math.max(top, Math.abs(at(run, y, x)));
  });
  return top || 1;
}

function paint(canvas, run) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const top = limit(), strength = $("strength").value / 100, signed = $("signed").checked;
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = "#ededed";
  pen.fillRect(0, 0, SIDE, SIDE);
  if (pictures[state.image]) pen.drawImage(pictures[state.image], 0, 0, SIDE, SIDE);
  const shown = pen.getImageData(0, 0, SIDE, SIDE), px = shown.data;
  for (let y = 0, p = 0; y < SIDE; y++) for (let x = 0; x < SIDE; x++, p += 4) {
    let v = value(run, (y + .5) / SIDE, (x + .5) / SIDE);
    if (!signed && v < 0) v = 0;
    const k = 3 * clamp(Math.floor(256 * (.5 + v / (2 * top))), 0, 255);
    const weight = strength * clamp(1.5 * Math.abs(v) / top, 0, 1);
    for (let c = 0; c < 3; c++) px[p + c] = (1 - weight) * px[p + c] + weight * COLOURS[k + c];
  }
  pen.putImageData(shown, 0, 0);
  if ($("boxes").checked) outline(pen);
}

// Dashed boxes around the label's objects
function outline(pen) {
  const boxes = D.images[state.image].boxes.filter(box => box[0] === state.label);
  for (const [colour, width, dash] of [["#fff", 3, []], ["#000", 2, [7, 5]]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.setLineDash(dash);
    for (const [, x, y, w, h] of boxes) pen.strokeRect(x * SIDE, y * SIDE, w * SIDE, h * SIDE);
  }
}

// ---- Panels, one a run

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, v] of Object.entries(attributes)) made.setAttribute(name, v);
  made.textContent = text;
  return made;
}

const panels = D.runs.map(run => {
  const box = element("section"), meter = element("div", { class: "meter" }), rank = element("p", { class: "soft" });
  const canvas = element("canvas", { class: "map", width: SIDE, height: SIDE, role: "img" });
  box.append(element("h2", {}, run.title), canvas, meter, rank);
  canvas.addEventListener("pointermove", event => {
    const r = canvas.getBoundingClientRect();
    point((event.clientY - r.top) / r.height, (event.clientX - r.left) / r.width);
  });
  canvas.addEventListener("pointerleave", () => show());
  $("runs").append(box);
  return { canvas, meter, rank };
});

function fill(n) {
  const run = D.images[state.image].runs[n], { canvas, meter, rank } = panels[n];
  paint(canvas, n);
  canvas.setAttribute("aria-label", `map of ${D.classes[state.label]}, ${D.runs[n].title}`);
  meter.replaceChildren();
  run.scores[state.label].forEach((v, stream) => {
    const track = element("div");
    track.append(element("i", { style: `width: ${100 * v}%` }));
    meter.append(element("span", {}, D.streams[stream]), track, element("b", {}, v.toFixed(2)));
  });
  rank.textContent = `ranks ${run.ranks[state.label]} of ${C} by ${D.runs[n].ranked}`;
}

// "0.31 without, 0.52 with": one number a run
const each = number => D.runs.map((run, n) => `${number(n)} ${run.word}`.trim()).join(", ");

const framed = location.protocol === "about:";  // in a notebook
$("back").hidden = framed;

function show() {
  const im = D.images[state.image], top = limit(), scale = top < 1 ? top.toPrecision(2) : top.toFixed(1);
  const known = { 1: " (present)", 0: " (absent)", "-1": " (not known)" }[im.targets[state.label]];
  panels.forEach((_, n) => fill(n));
  $("low").textContent = `−${scale}`;
  $("high").textContent = `+${scale}`;
  $("status").textContent = `Image ${im.id}, ${D.classes[state.label]}${known}: `
    + `confidence ${each(n => im.runs[n].scores[state.label][0].toFixed(2))}; `
    + `ranks ${each(n => im.runs[n].ranks[state.label])}.`;
  if (!framed) history.replaceState(null, "", `#image=${state.image}&label=${state.label}`);
}

function point(v, u) {
  if (u < 0 || v < 0 || u >= 1 || v >= 1) return;
  $("status").textContent = `at ${Math.round(100 * u)} % across, ${Math.round(100 * v)} % down: `
    + each(n => value(n, v, u).toFixed(2));
  panels.forEach(({ canvas }, n) => {
    paint(canvas, n);
    const pen = canvas.getContext("2d");
    pen.setLineDash([]);
    pen.lineWidth = 1;
    pen.strokeStyle = "#000";
    pen.strokeRect(u * SIDE - 4, v * SIDE - 4, 8, 8);
    pen.strokeStyle = "#fff";
    pen.strokeRect(u * SIDE - 5, v * SIDE - 5, 10, 10);
  });
}

// ---- Choosing an image and a label

const score = (image, c) => D.images[image].runs.at(-1).scores[c][0];
const present = (image, c) => D.images[image].targets[c];
const order = image => [...D.classes.keys()].sort((a, b) =>
  (present(image, b) === 1) - (present(image, a) === 1) || score(image, b) - score(image, a) || a - b);

function mark(list, chosen) {
  for (const button of list.children) {
    const on = +button.dataset.n === chosen;
    button.setAttribute("aria-selected", on);
    button.tabIndex = on ? 0 : -1;  // one tab stop a list; the arrow keys move in it
    if (on) list.scrollTo(
      button.offsetLeft - list.offsetLeft - list.clientWidth / 2,
      button.offsetTop - list.offsetTop - list.clientHeight / 2);
  }
}

function chooseLabel(c) {
  state.label = c;
  mark($("labels"), c);
  show();
}

function chooseImage(n, label) {
  state.image = n;
  mark($("images"), n);
  $("labels").replaceChildren(...order(n).map(c => {
    const there = present(n, c), sign = { 1: "● ", "-1": "? " }[there] ?? "";
    const chip = element("button", { role: "option", "data-n": c, class: there === 1 ? "there" : "" },
      `${sign}${D.classes[c]} ${score(n, c).toFixed(2)}`);
    chip.onclick = () => chooseLabel(c);
    return chip;
  }));
  chooseLabel(label ?? order(n)[0]);
}

D.images.forEach((im, n) => {
  const button = element("button", { role: "option", "data-n": n, "aria-label": `image ${im.id}` });
  button.append(im.picture ? element("img", { src: im.picture, alt: "" }) : element("span", {}, im.id));
  button.onclick = () => chooseImage(n);
  $("images").append(button);
});

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "range") return;
  const next = (n, by, size) => (n + by + size) % size, labels = order(state.image);
  const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key], move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const box = { b: "boxes", n: "signed" }[event.key];
  if (turn) chooseImage(next(state.image, turn, D.images.length));
  else if (move) chooseLabel(labels[next(labels.indexOf(state.label), move, C)]);
  else if (box) $(box).click();
  if (turn || move) event.preventDefault();
});
for (const id of ["boxes", "signed", "smooth", "own", "strength"]) $(id).addEventListener("input", show);

// ---- Start: at the image and label of the address, else at the first

const bar = $("bar").getContext("2d");
for (let k = 0; k < 256; k++) {
  bar.fillStyle = `rgb(${COLOURS.slice(3 * k, 3 * k + 3).join()})`;
  bar.fillRect(k, 0, 1, 12);
}
const asked = new URLSearchParams(location.hash.slice(1));
const number = (name, size) => {
  const n = parseInt(asked.get(name));
  return n >= 0 && n < size ? n : undefined;
};
Promise.all(pictures.map(p => p && p.decode().catch(() => null))).then(() => {
  chooseImage(number("image", D.images.length) ?? 0, number("label", C));
  document.body.dataset.ready = "1";
});
