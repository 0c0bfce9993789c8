"use strict";
// The map of the data: a canvas with pan and zoom, thumbnails cut from sheets, and the nearest images of a point.
(() => {
  const byId = (name) => document.getElementById(name);
  const data = JSON.parse(byId("map-points").textContent);
  const sheets = [...document.querySelectorAll(".sheet-of-map")];
  const canvas = byId("map-canvas"), tip = byId("map-tip"), chosen = byId("map-chosen"), pen = canvas.getContext("2d");
  const count = data.x.length, perSheet = data.columns * data.columns, dark = matchMedia("(prefers-color-scheme: dark)");
  const view = { scale: 1, x: 0, y: 0 };
  let width = 0, height = 0, hovered = -1, selected = -1, only = -1, thumbnails = false;

  const colour = (label) => {
    if (label < 0) return dark.matches ? "#6cabff" : "#1769d2";
    const turn = data.classes.length <= 12 ? (label * 360) / data.classes.length : (label * 137.508) % 360;
    return `hsl(${turn} 70% ${(dark.matches ? 66 : 45) - (label % 2) * 8}%)`;
  };
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  const label = (point) => (data.labels[point] < 0 ? "" : data.classes[data.labels[point]] ?? "");
  const edge = 28;
  const place = (point) => [
    (edge + (data.x[point] / 10000) * (width - 2 * edge)) * view.scale + view.x,
    (edge + (data.y[point] / 10000) * (height - 2 * edge)) * view.scale + view.y,
  ];

  function thumbnail(target, point, left, top, side) {
    const sheet = sheets[Math.floor(point / perSheet)], at = point % perSheet;
    if (!sheet.complete) return;
    const x = (at % data.columns) * data.cell, y = Math.floor(at / data.columns) * data.cell;
    target.drawImage(sheet, x, y, data.cell, data.cell, left, top, side, side);
  }

  function imageOf(point) {
    const small = document.createElement("canvas");
    small.width = small.height = 2 * data.cell;
    thumbnail(small.getContext("2d"), point, 0, 0, 2 * data.cell);
    return small;
  }

  function draw() {
    const ratio = devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    const marked = new Set(selected < 0 ? [] : [selected, ...data.near[selected]]);
    const radius = Math.min(7, (count < 300 ? 5 : 3.5) * Math.sqrt(view.scale));
    const side = Math.min(64, 20 * Math.sqrt(view.scale));
    const order = [...Array(count).keys()].filter((point) => !marked.has(point)).concat([...marked].reverse());
    if (selected >= 0) {
      pen.strokeStyle = style("--muted");
      for (const near of data.near[selected]) {
        pen.beginPath();
        pen.moveTo(...place(selected));
        pen.lineTo(...place(near));
        pen.stroke();
      }
    }
    for (const point of order) {
      const [x, y] = place(point);
      if (x < -64 || y < -64 || x > width + 64 || y > height + 64) continue;
      const faint = (only >= 0 && data.labels[point] !== only) || (marked.size && !marked.has(point));
      pen.globalAlpha = faint ? 0.16 : 0.9;
      pen.fillStyle = colour(data.labels[point]);
      if (thumbnails) {
        pen.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
        thumbnail(pen, point, x - side / 2, y - side / 2, side);
      } else {
        pen.beginPath();
        pen.arc(x, y, point === hovered || point === selected ? radius + 2.5 : radius, 0, 7);
        pen.fill();
      }
      if (point === hovered || point === selected) {
        pen.strokeStyle = style("--text");
        pen.lineWidth = 2;
        pen.stroke();
        pen.lineWidth = 1;
      }
    }
    pen.globalAlpha = 1;
  }

  function nearestPoint(x, y, reach) {
    let best = -1, least = reach * reach;
    for (let point = 0; point < count; point++) {
      if (only >= 0 && data.labels[point] !== only) continue;
      const [px, py] = place(point), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  function hover(point) {
    if (point === hovered) return;
    hovered = point;
    tip.hidden = point < 0;
    if (point >= 0) {
      const [x, y] = place(point);
      tip.replaceChildren(imageOf(point), `${label(point) ? label(point) + ", " : ""}${data.names[point]}`);
      const left = x + 158 > width ? x - 154 : x + 12;
      tip.style.left = `${Math.max(4, Math.min(width - 146, left))}px`;
      tip.style.top = `${Math.max(4, Math.min(height - 180, y - 60))}px`;
    }
    draw();
  }

  function select(point) {
    selected = point;
    chosen.hidden = point < 0;
    if (point >= 0) {
      const title = document.createElement("h3"), row = document.createElement("div"), near = document.createElement("div");
      title.textContent = [label(point), data.names[point], `image ${data.ids[point]}`].filter(Boolean).join(", ");
      title.style.overflowWrap = "anywhere";
      row.className = "row";
      near.className = "near8";
      data.near[point].forEach((other, at) => {
        const button = document.createElement("button"), text = document.createElement("span");
        button.type = "button";
        button.title = data.names[other];
        text.textContent = `${data.cosines[point][at].toFixed(3)} ${label(other)}`;
        text.className = data.labels[other] === data.labels[point] ? "" : "other";
        button.append(imageOf(other), text);
        button.onclick = () => select(other);
        near.append(button);
      });
      row.append(imageOf(point), near);
      chosen.replaceChildren(title, row);
    }
    draw();
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const scale = Math.min(40, Math.max(1, view.scale * factor)), ratio = scale / view.scale;
    view.x = scale === 1 ? 0 : x - (x - view.x) * ratio;
    view.y = scale === 1 ? 0 : y - (y - view.y) * ratio;
    view.scale = scale;
    canvas.style.touchAction = scale > 1 ? "none" : "pan-y"; // an enlarged map is moved by the finger, not the page
    hover(-1);
    draw();
  }

  const pointers = new Map();
  let moved = 0;
  canvas.onpointerdown = (event) => {
    if (!pointers.size) moved = 0;
    pointers.set(event.pointerId, event);
    if (view.scale > 1) canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return void (event.pointerType === "mouse" && hover(nearestPoint(event.offsetX, event.offsetY, 18)));
    const others = [...pointers.values()].filter((each) => each.pointerId !== event.pointerId);
    moved += Math.abs(event.offsetX - before.offsetX) + Math.abs(event.offsetY - before.offsetY);
    if (others.length) {
      const gap = (one) => Math.hypot(one.offsetX - others[0].offsetX, one.offsetY - others[0].offsetY) || 1;
      zoom(gap(event) / gap(before), others[0].offsetX, others[0].offsetY);
    } else if (view.scale > 1) {
      view.x += event.offsetX - before.offsetX;
      view.y += event.offsetY - before.offsetY;
      hover(-1);
      draw();
    }
    pointers.set(event.pointerId, event);
  };
  const release = (event) => pointers.delete(event.pointerId);
  canvas.onpointerup = (event) => {
    release(event);
    if (moved < 8) select(nearestPoint(event.offsetX, event.offsetY, event.pointerType === "mouse" ? 18 : 30));
  };
  canvas.onpointercancel = release;
  canvas.onpointerleave = () => hover(-1);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && view.scale === 1 && event.deltaY > 0) return; // the page scrolls on
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.onkeydown = (event) => {
    if (event.key === "Escape") select(-1);
    if (event.key === "ArrowRight" || event.key === "ArrowLeft")
      select((selected + (event.key === "ArrowRight" ? 1 : count - 1) + count) % count);
  };
  byId("map-in").onclick = () => zoom(1.6);
  byId("map-out").onclick = () => zoom(1 / 1.6);
  byId("map-all").onclick = () => { zoom(0); select(-1); };
  byId("map-thumbs").onclick = (event) => {
    thumbnails = !thumbnails;
    event.currentTarget.setAttribute("aria-pressed", thumbnails);
    draw();
  };
  for (const image of document.querySelectorAll("img[data-point]")) {
    image.style.cursor = "pointer";
    image.onclick = () => {
      select(Number(image.dataset.point));
      byId("map").scrollIntoView();
    };
  }
  const present = new Set(data.labels);
  data.classes.forEach((name, number) => {
    if (!present.has(number)) return;
    const button = document.createElement("button"), dot = document.createElement("i");
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-pressed", "false");
    dot.style.background = colour(number);
    button.append(dot, name);
    button.onclick = () => {
      only = only === number ? -1 : number;
      [...byId("map-classes").children].forEach((each) => each.setAttribute("aria-pressed", each === button && only >= 0));
      draw();
    };
    byId("map-classes").append(button);
  });
  new ResizeObserver(draw).observe(canvas);
  dark.onchange = draw;
  Promise.all(sheets.map((sheet) => sheet.decode().catch(() => null))).then(() => {
    draw();
    const point = /^#image-(\d+)$/.exec(location.hash); // a link to one image
    if (point && data.ids.includes(Number(point[1]))) select(data.ids.indexOf(Number(point[1])));
  });
})();
