"use strict";
// Data of the page: the element "data" is JSON, and image N has its JPEG in the element "iN" and
// the masks of its objects in "mN", which are read only when the image comes into view.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const collator = new Intl.Collator(undefined, { numeric: true });
  const images = data.images.map((image, index) => ({ ...image, index }));
  const hasGt = images.some((image) => image.gt);
  document.body.classList.toggle("has-gt", hasGt);

  const defaults = {
    classes: [], score: data.score, query: "", which: "all", sort: "name", view: hasGt ? "both" : "pred",
  };
  const state = { ...defaults };

  // ---- elements ----

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const nameOf = (label) => data.classes[label] ?? String(label);

  function colourOf(label, variant = 0) {
    const base = data.colours[label] ?? [128, 128, 128];
    // Objects of a class get shades of its colour.
    const shade = [0, 0.3, -0.25, 0.5, -0.4][variant % 5];
    return base.map((c) => Math.round(shade > 0 ? c + (255 - c) * shade : c * (1 + shade)));
  }

  function swatch(label, variant = 0) {
    const made = element("span", { class: "swatch" });
    made.style.background = `rgb(${colourOf(label, variant)})`;
    return made;
  }

  // ---- what is shown ----

  const isChosen = (label) => !state.classes.length || state.classes.includes(label);
  const isScored = (object) => object[1] === null || object[1] >= state.score;
  const shownPred = (image) => image.pred.filter((o) => isScored(o) && isChosen(o[0]));
  const shownGt = (image) => (image.gt ?? []).filter((o) => isChosen(o[0]));

  function difference(image) {
    if (!image.gt) return -1;
    const counts = new Map();
    const add = (label, number) => counts.set(label, (counts.get(label) ?? 0) + number);
    shownPred(image).forEach((o) => add(o[0], 1));
    shownGt(image).forEach((o) => add(o[0], -1));
    return [...counts.values()].reduce((sum, value) => sum + Math.abs(value), 0);
  }

  function isShown(image) {
    if (!image.name.toLowerCase().includes(state.query.toLowerCase())) return false;
    const pred = shownPred(image).length;
    // Missed objects of a chosen class are in the ground truth only.
    const any = pred + shownGt(image).length;
    switch (state.which) {
      case "some": return pred > 0;
      case "none": return pred === 0 && (!state.classes.length || any > 0);
      case "differs": return difference(image) > 0;
      default: return !state.classes.length || (state.view === "pred" ? pred : any) > 0;
    }
  }

  function sortKey(image) {
    const scores = shownPred(image).map((o) => o[1]).filter((score) => score !== null);
    switch (state.sort) {
      case "most": return -shownPred(image).length;
      case "fewest": return shownPred(image).length;
      case "high": return scores.length ? -Math.max(...scores) : 1;
      case "low": return scores.length ? Math.min(...scores) : 2;
      case "difference": return -difference(image);
      default: return 0;
    }
  }

  // ---- masks ----

  // COCO's compressed run-length encoding, columns first.
  function decodeMask(text, height, width) {
    const counts = [];
    for (let p = 0; p < text.length;) {
      let value = 0, shift = 0, code;
      do {
        code = text.charCodeAt(p++) - 48;
        value |= (code & 31) << shift;
        shift += 5;
      } while (code & 32);
      if (code & 16) value |= -1 << shift;
      counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
    }
    const mask = new Uint8Array(height * width);
    let position = 0, x0 = width, x1 = -1, y0 = height, y1 = -1;
    const pixels = [];
    counts.forEach((number, i) => {
      if (i % 2) {
        for (let j = position; j < position + number; j++) {
          const x = Math.floor(j / height), y = j % height;
          mask[y * width + x] = 1;
          if (x < x0) x0 = x;
          if (x > x1) x1 = x;
          if (y < y0) y0 = y;
          if (y > y1) y1 = y;
        }
        if (number) pixels.push([position, number]);
      }
      position += number;
    });
    return { mask, x0, x1, y0, y1, anchor: middle(pixels, height) };
  }

  // A point inside a mask: the middle of the longest run of its median column.
  function middle(runs, height) {
    const total = runs.reduce((sum, run) => sum + run[1], 0);
    let seen = 0;
    for (const [start, number] of runs) {
      seen += number;
      if (seen * 2 >= total) {
        const at = start + Math.floor(number / 2);
        return [Math.floor(at / height), at % height];
      }
    }
    return [0, 0];
  }

  const masksOf = (image) => JSON.parse($(`m${image.index}`).textContent);
  const sourceOf = (image) => `data:image/jpeg;base64,${$(`i${image.index}`).textContent.trim()}`;

  // The shown objects of one side with their masks, large ones first, so that small ones are on top.
  function layers(image, side, texts) {
    const offset = side === "gt" ? image.pred.length : 0;
    const variants = new Map();
    return (image[side] ?? [])
      .map((object, i) => {
        const variant = variants.get(object[0]) ?? 0;
        variants.set(object[0], variant + 1);
        return { label: object[0], score: side === "gt" ? null : object[1], crowd: side === "gt" && object[1],
                 area: object[2], text: texts[offset + i], variant };
      })
      .filter((o) => isChosen(o.label) && (o.score === null || o.score >= state.score))
      .map((o) => ({ ...o, ...decodeMask(o.text, image.h, image.w) }))
      .sort((a, b) => b.area - a.area);
  }

  function paint(canvas, image, objects, opacity, picked = null) {
    const { w: width, h: height } = image;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    for (const object of objects) {
      const [red, green, blue] = colourOf(object.label, object.variant);
      const strength = picked === null ? 1 : object === picked ? 1.4 : 0.25;
      const fill = Math.min(255, 255 * opacity * strength), edge = Math.min(255, 510 * opacity * strength);
      const { mask, x0, x1, y0, y1 } = object;
      for (let y = y0; y <= y1; y++) {
        for (let x = x0; x <= x1; x++) {
          const at = y * width + x;
          if (!mask[at]) continue;
          const inside = x > 0 && mask[at - 1] && x < width - 1 && mask[at + 1]
            && y > 0 && mask[at - width] && y < height - 1 && mask[at + width];
          pixels.data[4 * at] = red;
          pixels.data[4 * at + 1] = green;
          pixels.data[4 * at + 2] = blue;
          pixels.data[4 * at + 3] = inside ? fill : edge;
        }
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  // ---- grid ----

  function stage(image, side) {
    const what = side === "gt" ? "ground truth" : "prediction";
    const made = element("span", { class: "stage", "data-side": side });
    if (hasGt) made.append(element("span", { class: "what" }, what));
    if (side === "gt" && !image.gt) made.append(element("span", { class: "empty" }, "no ground truth"));
    else made.append(element("img", { alt: "" }), element("canvas"));
    return made;
  }

  const visible = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const image = images[entry.target.dataset.index];
      if (entry.isIntersecting) {
        visible.add(image);
        draw(image);
      } else if (visible.delete(image)) {
        release(image);
      }
    }
  }, { rootMargin: "300px" });

  for (const image of images) {
    image.stages = element("span", { class: "stages" });
    image.text = element("span");
    const caption = element("span", { class: "caption" }, element("b", { title: image.name }, image.name), image.text);
    image.card = element("button", { type: "button", class: "card", onclick: () => open(image) }, image.stages, caption);
    image.item = element("li", { "data-index": image.index }, image.card);
    observer.observe(image.item);
  }

  const sides = () => (state.view === "both" ? ["pred", "gt"] : [state.view]);

  function draw(image) {
    const texts = masksOf(image);
    image.stages.replaceChildren(...sides().map((side) => {
      const made = stage(image, side);
      const canvas = made.querySelector("canvas");
      if (canvas) {
        made.querySelector("img").src = sourceOf(image);
        paint(canvas, image, layers(image, side, texts), 0.45);
      }
      return made;
    }));
  }

  // Pictures out of view take no memory.
  function release(image) {
    image.stages.replaceChildren(...sides().map(() => element("span", { class: "stage" })));
  }

  function describe(image) {
    const counts = new Map();
    const pred = shownPred(image);
    pred.forEach((o) => counts.set(o[0], (counts.get(o[0]) ?? 0) + 1));
    const most = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 3);
    const names = most.map(([label, n]) => (n > 1 ? `${n} ${nameOf(label)}` : nameOf(label)));
    const rest = counts.size > 3 ? ", …" : "";
    const listed = names.length ? `: ${names.join(", ")}${rest}` : "";
    const gt = image.gt ? `; gt ${shownGt(image).length}` : "";
    return `${plural(pred.length, data.unit)}${listed}${gt}`;
  }

  let shown = [];
  function update() {
    document.body.classList.toggle("both", state.view === "both");
    const keys = new Map(images.map((image) => [image, sortKey(image)]));
    shown = images.filter(isShown)
      .sort((a, b) => keys.get(a) - keys.get(b) || collator.compare(a.name, b.name));
    shown.forEach((image) => {
      image.text.textContent = describe(image);
      if (!visible.has(image)) release(image);
    });
    const kept = new Set(shown);
    visible.forEach((image) => {
      if (kept.has(image)) draw(image);
      else {
        visible.delete(image);
        release(image);
      }
    });
    $("grid").replaceChildren(...shown.map((image) => image.item));
    const objects = shown.reduce((sum, image) => sum + shownPred(image).length, 0);
    $("count").textContent = `${shown.length} of ${plural(images.length, "image")}, ${plural(objects, data.unit)}`;
    $("score-value").textContent = state.score.toFixed(2);
    updateClasses();
    writeHash();
  }

  // ---- classes ----

  const rows = data.classes.map((name, label) => {
    const box = element("input", { type: "checkbox", onchange: () => choose(label, box.checked) });
    const cells = [0, 1, 2].map((i) => element("td", i === 1 ? { class: "with-gt" } : {}));
    const row = element("tr", { "data-class": name },
      element("td", {}, element("label", {}, box, swatch(label), name)), ...cells);
    return { name, label, box, row, cells };
  });

  function choose(label, isOn) {
    state.classes = state.classes.filter((other) => other !== label).concat(isOn ? [label] : []);
    update();
  }

  function updateClasses() {
    const counts = data.classes.map(() => [0, 0, 0]);
    for (const image of images) {
      const seen = new Set();
      for (const object of image.pred) {
        if (!isScored(object) || !counts[object[0]]) continue;
        counts[object[0]][0] += 1;
        seen.add(object[0]);
      }
      seen.forEach((label) => { counts[label][2] += 1; });
      (image.gt ?? []).forEach((o) => { if (counts[o[0]]) counts[o[0]][1] += 1; });
    }
    const search = $("class-search").value.toLowerCase();
    const absent = [];
    for (const { name, label, box, row, cells } of rows) {
      counts[label].forEach((number, i) => { cells[i].textContent = number; });
      box.checked = state.classes.includes(label);
      row.classList.toggle("chosen", box.checked);
      const isAbsent = !counts[label][0] && !counts[label][1];
      if (isAbsent) absent.push(name);
      row.hidden = (isAbsent && !box.checked) || !name.toLowerCase().includes(search);
    }
    const order = [...rows].sort((a, b) => b.box.checked - a.box.checked
      || counts[b.label][0] - counts[a.label][0]
      || counts[b.label][1] - counts[a.label][1] || collator.compare(a.name, b.name));
    if (!$("classes").contains(document.activeElement)) {
      $("classes").tBodies[0].replaceChildren(...order.map((one) => one.row));
    }
    const listed = absent.slice(0, 30).join(", ") + (absent.length > 30 ? ", …" : "");
    $("absent").textContent = absent.length ? `Not seen (${absent.length}): ${listed}` : "";
    const names = state.classes.map(nameOf).join(", ");
    $("chosen").textContent = names && `· ${names}`;
    $("clear").disabled = !state.classes.length;
  }

  // ---- the address keeps the filters: #class=cat&score=0.5&sort=most ----

  function writeHash() {
    const hash = new URLSearchParams();
    state.classes.forEach((label) => hash.append("class", nameOf(label)));
    for (const key of ["score", "query", "which", "sort", "view"]) {
      if (state[key] !== defaults[key]) hash.set(key, state[key]);
    }
    if (opened) hash.set("open", opened.image.name);
    history.replaceState(null, "", `#${hash}`);
  }

  function readHash() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const names = new Set(hash.getAll("class"));
    state.classes = rows.filter((row) => names.has(row.name)).map((row) => row.label);
    const score = Number.parseFloat(hash.get("score"));
    state.score = score >= 0 && score <= 1 ? score : defaults.score;
    state.query = hash.get("query") ?? "";
    for (const key of ["which", "sort", "view"]) {
      const options = [...$(key).options].filter((o) => hasGt || !o.classList.contains("with-gt"));
      const value = hash.get(key);
      state[key] = options.some((o) => o.value === value) ? value : defaults[key];
    }
    if (!hasGt) state.view = "pred";
    for (const key of ["score", "query", "which", "sort", "view"]) $(key).value = state[key];
    update();
    const wanted = images.find((image) => image.name === hash.get("open"));
    if (wanted) open(wanted);
    else $("viewer").close();
  }

  // ---- one image, large ----

  let opened = null;

  function open(image) {
    opened = { image, picked: null };
    $("viewer-name").textContent = image.name;
    const body = $("viewer-body");
    const shownSides = image.gt ? ["pred", "gt"] : ["pred"];
    body.style.setProperty("--columns", shownSides.length);
    body.classList.toggle("single", shownSides.length === 1);
    const texts = masksOf(image);
    opened.parts = shownSides.map((side) => part(image, side, layers(image, side, texts)));
    body.replaceChildren(...opened.parts.map((one) => one.section));
    redraw();
    if (!$("viewer").open) $("viewer").showModal();
    $("viewer").scrollTop = 0;
    place();
    writeHash();
  }

  function place() {
    const index = shown.indexOf(opened.image);
    const { width, height } = opened.image;
    $("viewer-place").textContent = `${width} × ${height}` + (index < 0 ? "" : `, ${index + 1} of ${shown.length}`);
    $("previous").disabled = index <= 0;
    $("next").disabled = index < 0 || index === shown.length - 1;
  }

  function part(image, side, objects) {
    const frame = element("div", { class: "stage" }, element("img", { alt: "", src: sourceOf(image) }));
    frame.style.aspectRatio = `${image.w} / ${image.h}`;
    frame.style.maxWidth = `calc(68dvh * ${image.w} / ${image.h})`;
    const canvas = element("canvas", { onclick: (event) => pickAt(event, canvas, objects) });
    frame.append(canvas);
    const listed = [...objects].sort((a, b) => (b.score ?? 0) - (a.score ?? 0) || b.area - a.area);
    const isScored = objects.some((o) => o.score !== null);
    for (const object of listed) {
      object.tag = element("span", { class: "tag" },
        nameOf(object.label) + (object.score === null ? "" : ` ${object.score.toFixed(2)}`));
      const left = (100 * (object.anchor[0] + 0.5)) / image.w;
      object.tag.style.left = `${left}%`;
      // Labels at the sides stay inside.
      object.tag.style.setProperty("--shift", `${-Math.min(100, Math.max(0, 1.4 * left - 20))}%`);
      object.tag.style.top = `${(100 * (object.anchor[1] + 0.5)) / image.h}%`;
      object.tag.style.borderColor = `rgb(${colourOf(object.label, object.variant)})`;
      frame.append(object.tag);
      const crowd = object.crowd ? element("span", { class: "dim" }, " crowd") : "";
      object.button = element("button", { type: "button", "aria-pressed": "false", onclick: () => pick(object) },
        swatch(object.label, object.variant), element("span", {}, nameOf(object.label), crowd));
      object.row = element("tr", {}, element("td", {}, object.button));
      if (isScored) object.row.append(element("td", {}, object.score === null ? "" : object.score.toFixed(3)));
      object.row.append(element("td", {}, `${(100 * object.area).toFixed(object.area < 0.1 ? 2 : 1)} %`));
    }
    const head = element("tr", {}, element("th", { scope: "col" }, data.unit));
    if (isScored) head.append(element("th", { scope: "col" }, "score"));
    head.append(element("th", { scope: "col" }, "area"));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...listed.map((o) => o.row)));
    const title = side === "gt" ? "Ground truth" : "Prediction";
    const section = element("section", {}, element("h3", {}, `${title}: ${plural(objects.length, data.unit)}`),
      frame, element("div", { class: "objects" }, table));
    return { section, canvas, objects };
  }

  function redraw() {
    for (const { canvas, objects } of opened.parts) {
      const picked = objects.includes(opened.picked) ? opened.picked : null;
      paint(canvas, opened.image, objects, Number($("opacity").value), picked);
      for (const object of objects) {
        object.tag.hidden = !$("labels").checked && object !== picked;
        object.row.classList.toggle("picked", object === picked);
        object.button.setAttribute("aria-pressed", object === picked);
      }
    }
  }

  function pick(object) {
    opened.picked = opened.picked === object ? null : object;
    redraw();
  }

  function pickAt(event, canvas, objects) {
    const { w: width, h: height } = opened.image;
    const box = canvas.getBoundingClientRect();
    const x = Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width));
    const y = Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height));
    const hit = objects.filter((o) => o.mask[y * width + x]).pop() ?? null;
    opened.picked = opened.picked === hit ? null : hit;
    redraw();
    if (opened.picked) opened.picked.row.scrollIntoView({ block: "nearest" });
  }

  function step(by) {
    const next = shown[shown.indexOf(opened.image) + by];
    if (next) open(next);
  }

  // ---- events ----

  $("viewer").addEventListener("close", () => {
    const { image } = opened;
    opened = null;
    writeHash();
    image.card.focus();
  });
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  $("close").addEventListener("click", () => $("viewer").close());
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("opacity").addEventListener("input", redraw);
  $("labels").addEventListener("change", redraw);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const key of ["query", "which", "sort", "view", "score"]) {
    let timer;
    $(key).addEventListener("input", () => {
      state[key] = key === "score" ? Number($(key).value) : $(key).value;
      if (key === "score") $("score-value").textContent = state.score.toFixed(2);
      clearTimeout(timer);
      timer = setTimeout(update, key === "query" || key === "score" ? 120 : 0);
    });
  }
  $("class-search").addEventListener("input", updateClasses);
  $("clear").addEventListener("click", () => { state.classes = []; update(); });
  addEventListener("hashchange", readHash);

  // ---- start ----

  $("summary").textContent = data.summary;
  $("notes").append(...data.notes.map((note) => element("li", {}, note)));
  if (data.broken.length) {
    $("broken").hidden = false;
    $("broken").querySelector("summary").textContent = `${plural(data.broken.length, "file")} could not be predicted`;
    $("broken").querySelector("tbody").append(...data.broken.map(([name, reason]) =>
      element("tr", {}, element("td", {}, name), element("td", {}, reason))));
  }
  if (matchMedia("(max-width: 800px)").matches) $("class-panel").open = false;
  readHash();
})();
