// The chart: curves, points, intervals and frontiers on a canvas, which shows 35,000 points within a tenth of a second.
"use strict";

// A regular polygon, or a star with every other corner at another radius: corners around the origin, the first at an angle.
function listCorners(count, angle, radius = 1, other = radius) {
  return Array.from({ length: count }, (_, k) => {
    const [turn, reach] = [angle + (2 * Math.PI * k) / count, k % 2 ? other : radius];
    return [reach * Math.cos(turn), reach * Math.sin(turn)];
  });
}

const UP = -Math.PI / 2;
const PLUS = [[-0.4, -1], [0.4, -1], [0.4, -0.4], [1, -0.4], [1, 0.4], [0.4, 0.4], [0.4, 1], [-0.4, 1], [-0.4, 0.4], [-1, 0.4], [-1, -0.4], [-0.4, -0.4]];
const thin = ([x, y]) => [Math.abs(x) === 0.4 ? x / 2 : x, Math.abs(y) === 0.4 ? y / 2 : y];
const lean = ([x, y]) => [(x - y) * Math.SQRT1_2, (x + y) * Math.SQRT1_2];
// matplotlib's markers, as corners. Each is filled alone: one path of many that overlap takes twenty times as long.
const MARKERS = {
  o: listCorners(16, 0), v: listCorners(3, -UP, 1.15), "^": listCorners(3, UP, 1.15), "<": listCorners(3, Math.PI, 1.15),
  ">": listCorners(3, 0, 1.15), s: listCorners(4, Math.PI / 4, 1.2), D: listCorners(4, 0, 1.15), d: listCorners(4, 0, 0.7, 1.2),
  p: listCorners(5, UP), h: listCorners(6, UP), H: listCorners(6, 0), 8: listCorners(8, Math.PI / 8), "*": listCorners(10, UP, 1.3, 0.5),
  P: PLUS, X: PLUS.map(lean), "+": PLUS.map(thin), x: PLUS.map(thin).map(lean),
};
const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3], [14, 4], [14, 3, 2, 3]];
const NEAR = 14; // pixels: how far from a point the pointer may be
const MANY = 3000; // points: more are drawn small
const LEAST_DRAG = 6; // pixels: less is a click

class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.zoom = null; // {x: [low, high], y: [low, high]}
    this.box = null; // being dragged
  }

  // scene: groups [{look, points}], curves [{look, line}], frontiers [{points}], x, y, low, high, isStopped (functions of a
  // point), xTitle, yTitle, intervals, selected.
  draw(scene) {
    this.scene = scene;
    const style = getComputedStyle(this.canvas);
    this.ink = style.color;
    this.paper = style.backgroundColor;
    this.grid = style.borderTopColor;
    this.resize();
    this.points = scene.groups.flatMap((group) => group.points);
    this.size = this.points.length > MANY ? 2.5 : this.points.length > 600 ? 3.5 : 5;
    this.setScales();
    this.drawAxes();
    this.pen.save();
    this.pen.beginPath();
    this.pen.rect(this.left, this.top, this.width - this.left - this.right, this.height - this.top - this.bottom);
    this.pen.clip();
    if (scene.intervals) this.drawIntervals();
    this.drawCurves();
    this.drawFrontiers();
    this.drawPoints();
    this.drawSelected();
    this.pen.restore();
    if (this.box) this.drawBox();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.clearRect(0, 0, width, height);
    this.pen.font = `13px ${getComputedStyle(this.canvas).fontFamily}`;
    Object.assign(this, { width, height, left: 62, right: 22, top: 12, bottom: 46 });
  }

  setScales() {
    const { x, y, low, high, intervals } = this.scene;
    const bounds = { x: [Infinity, -Infinity], y: [Infinity, -Infinity] };
    const include = (axis, value) => {
      if (value === null) return;
      if (value < bounds[axis][0]) bounds[axis][0] = value;
      if (value > bounds[axis][1]) bounds[axis][1] = value;
    };
    for (const point of this.points) {
      include("x", Math.log(x(point)));
      include("y", y(point));
      if (intervals) {
        include("y", low(point));
        include("y", high(point));
      }
    }
    for (const axis of ["x", "y"]) {
      const [least, most] = bounds[axis][0] > bounds[axis][1] ? [0, 1] : bounds[axis];
      const pad = least === most ? Math.max(Math.abs(least) * 0.05, 0.1) : (most - least) * 0.04;
      bounds[axis] = [least - pad, most + pad];
    }
    this.bounds = this.zoom || bounds;
    const [[x0, x1], [y0, y1]] = [this.bounds.x, this.bounds.y];
    const across = this.width - this.left - this.right;
    const up = this.height - this.top - this.bottom;
    this.toX = (bits) => this.left + ((Math.log(bits) - x0) / (x1 - x0)) * across;
    this.toY = (value) => this.height - this.bottom - ((value - y0) / (y1 - y0)) * up;
    this.fromX = (place) => x0 + ((place - this.left) / across) * (x1 - x0); // the logarithm
    this.fromY = (place) => y0 + ((this.height - this.bottom - place) / up) * (y1 - y0);
  }

  drawAxes() {
    const { pen, width, height, left, right, top, bottom } = this;
    const [low, high] = this.bounds.x.map(Math.exp);
    pen.fillStyle = this.ink;
    pen.strokeStyle = this.grid;
    pen.lineWidth = 1;
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const tick of listTicks(low, high, (width - left - right) / 55, true)) {
      this.drawLine(this.toX(tick), top, this.toX(tick), height - bottom);
      pen.fillText(formatCount(tick), this.toX(tick), height - bottom + 6);
    }
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const tick of listTicks(...this.bounds.y, (height - top - bottom) / 60, false)) {
      this.drawLine(left, this.toY(tick), width - right, this.toY(tick));
      pen.fillText(Math.abs(tick) >= 1000 ? formatCount(tick) : String(tick), left - 6, this.toY(tick));
    }
    pen.textAlign = "center";
    pen.fillText(this.scene.xTitle, (left + width - right) / 2, height - 10);
    pen.save();
    pen.translate(12, (top + height - bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(this.scene.yTitle, 0, 0, height - top - bottom);
    pen.restore();
  }

  drawLine(x0, y0, x1, y1) {
    this.pen.beginPath();
    this.pen.moveTo(x0, y0);
    this.pen.lineTo(x1, y1);
    this.pen.stroke();
  }

  drawIntervals() {
    const { pen, scene } = this;
    pen.lineWidth = 1;
    for (const { look, points } of scene.groups) {
      pen.strokeStyle = this.colorOf(look);
      pen.globalAlpha = 0.6;
      pen.beginPath();
      for (const point of points) {
        if (scene.low(point) === null) continue;
        pen.moveTo(this.toX(scene.x(point)), this.toY(scene.low(point)));
        pen.lineTo(this.toX(scene.x(point)), this.toY(scene.high(point)));
      }
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  drawCurves() {
    const { pen, scene } = this;
    pen.lineWidth = scene.curves.length > 60 ? 0.8 : 1.5;
    pen.globalAlpha = scene.curves.length > 60 ? 0.45 : 0.8;
    for (const { look, line } of scene.curves) {
      pen.strokeStyle = this.colorOf(look);
      pen.beginPath();
      for (const [bits, value] of line) pen.lineTo(this.toX(bits), this.toY(value));
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  drawPoints() {
    const { pen, scene, size } = this;
    pen.lineWidth = 0.5;
    pen.strokeStyle = this.paper;
    for (const { look, points } of scene.groups) {
      const corners = MARKERS[look.marker].map(([x, y]) => [x * size, y * size]);
      pen.fillStyle = this.colorOf(look);
      const taken = new Set(); // of many points, those at one pixel in one colour are drawn once
      for (const point of points) {
        const [x, y] = [this.toX(scene.x(point)), this.toY(scene.y(point))];
        if (this.points.length > MANY) {
          const pixel = Math.round(x) * 65536 + Math.round(y);
          if (taken.has(pixel)) continue;
          taken.add(pixel);
        }
        pen.beginPath();
        for (const [right, down] of corners) pen.lineTo(x + right, y + down);
        pen.closePath();
        pen.fill();
        if (scene.isStopped(point)) this.hollow(x, y, corners);
        else if (size > 3) pen.stroke();
      }
    }
  }

  // Leave of a filled marker its edge: the point stopped early.
  hollow(x, y, corners) {
    const { pen } = this;
    const color = pen.fillStyle;
    pen.fillStyle = this.paper;
    pen.beginPath();
    for (const [right, down] of corners) pen.lineTo(x + right * 0.6, y + down * 0.6);
    pen.closePath();
    pen.fill();
    pen.fillStyle = color;
  }

  drawFrontiers() {
    const { pen, scene } = this;
    pen.strokeStyle = this.ink;
    pen.lineWidth = 2;
    scene.frontiers.forEach(({ points }, place) => {
      pen.setLineDash(DASHES[place % DASHES.length]);
      pen.beginPath();
      let last = null;
      for (const point of points) {
        const [x, y] = [this.toX(scene.x(point)), this.toY(scene.y(point))];
        if (last !== null) pen.lineTo(x, last);
        pen.lineTo(x, y);
        last = y;
      }
      pen.stroke();
    });
    pen.setLineDash([]);
  }

  drawSelected() {
    const { pen, scene } = this;
    if (scene.selected === null) return;
    pen.strokeStyle = this.ink;
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(this.toX(scene.x(scene.selected)), this.toY(scene.y(scene.selected)), this.size + 5, 0, 2 * Math.PI);
    pen.stroke();
  }

  drawBox() {
    const { pen, box } = this;
    pen.strokeStyle = this.ink;
    pen.lineWidth = 1;
    pen.setLineDash([4, 3]);
    pen.strokeRect(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
    pen.setLineDash([]);
  }

  colorOf(look) {
    return adaptColor(look.color, this.scene.background);
  }

  // The point nearest to a place on the canvas, or null if none is near.
  find(x, y) {
    let nearest = null;
    let least = NEAR ** 2;
    for (const point of this.points) {
      const distance = (this.toX(this.scene.x(point)) - x) ** 2 + (this.toY(this.scene.y(point)) - y) ** 2;
      if (distance <= least) [nearest, least] = [point, distance];
    }
    return nearest;
  }

  // A drag with a mouse zooms to its box. Fingers scroll the page, and tap points.
  listen({ hovered, clicked, zoomed }) {
    const place = (event) => {
      const frame = this.canvas.getBoundingClientRect();
      return [event.clientX - frame.left, event.clientY - frame.top];
    };
    let start = null;
    const isDrag = (x, y) => start !== null && Math.max(Math.abs(x - start[0]), Math.abs(y - start[1])) >= LEAST_DRAG;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType !== "mouse") return;
      start = place(event);
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (isDrag(x, y)) {
        this.box = { x0: start[0], y0: start[1], x1: x, y1: y };
        this.draw(this.scene);
      } else if (!start) hovered(this.find(x, y), x, y);
    });
    this.canvas.addEventListener("pointerup", (event) => {
      const [x, y] = place(event);
      const from = isDrag(x, y) ? start : null;
      [start, this.box] = [null, null];
      if (from === null) {
        clicked(this.find(x, y));
        return;
      }
      const order = (a, b) => [Math.min(a, b), Math.max(a, b)];
      this.zoom = { x: order(this.fromX(from[0]), this.fromX(x)), y: order(this.fromY(from[1]), this.fromY(y)) };
      zoomed();
    });
    this.canvas.addEventListener("pointercancel", () => ([start, this.box] = [null, null]));
    this.canvas.addEventListener("pointerleave", () => hovered(null, 0, 0));
  }
}
