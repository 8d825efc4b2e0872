// Draws the curves. The page is complete without it; the numbers are in its table.
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const host = document.getElementById('charts');
  const COLOURS = 8;
  const SIZE = { height: 178, left: 50, right: 12, top: 8, bottom: 22 };
  const many = data.runs.length > 1;
  const hidden = new Set();
  const charts = [];
  let smoothing = 0;

  const make = (tag, cls, text) => {
    const element = document.createElement(tag);
    if (cls) element.className = cls;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const format = (v) => {
    if (v === 0) return '0';
    const size = Math.abs(v);
    if (size >= 1e7 || size < 1e-4) return v.toExponential(2);
    if (size >= 1000) return Math.round(v).toLocaleString('en').replaceAll(',', '\u202f');
    return String(+v.toPrecision(4));
  };
  const short = (v) => {
    const size = Math.abs(v);
    if (size >= 1e9) return +(v / 1e9).toPrecision(3) + ' G';
    if (size >= 1e6) return +(v / 1e6).toPrecision(3) + ' M';
    if (size >= 1e4) return +(v / 1e3).toPrecision(3) + ' k';
    if (size > 0 && size < 1e-3) return v.toExponential(0);
    return String(+v.toPrecision(6));
  };

  // Round steps within a range: 1, 2 or 5 times a power of ten.
  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
  };
  const logTicks = (low, high) => {
    const found = [];
    const every = Math.max(1, Math.ceil((high - low) / 5));
    for (let e = Math.ceil(low - 1e-9); e <= high + 1e-9; e += every) found.push(10 ** e);
    if (found.length < 2) return [10 ** low, 10 ** ((low + high) / 2), 10 ** high].map((v) => +v.toPrecision(2));
    return found;
  };
  // Exponential moving average that does not start at zero.
  const smooth = (values, weight) => {
    if (!weight) return values;
    let mean = 0, mass = 0;
    return values.map((v) => {
      mean = weight * mean + (1 - weight) * v;
      mass = weight * mass + 1 - weight;
      return mean / mass;
    });
  };
  const nearest = (steps, at) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < at) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - at) <= Math.abs(steps[high] - at) ? low : high;
  };
  // A run that has not begun or has ended says nothing at a step.
  const covers = (line, at) => at >= line.steps[0] - 0.5 && at <= line.steps[line.steps.length - 1] + 0.5;
  const shown = (chart) => chart.lines.filter((line) => !hidden.has(line.run));

  function draw(chart) {
    const { plot, svg } = chart;
    const width = plot.clientWidth;
    if (!width) return;
    const lines = shown(chart).map((line) => ({ ...line, steps: data.steps[line.x], soft: smooth(line.y, smoothing) }));
    const all = lines.flatMap((line) => line.e ? line.y.flatMap((y, i) => [y - line.e[i], y + line.e[i]]) : line.y);
    svg.setAttribute('viewBox', `0 0 ${width} ${SIZE.height}`);
    svg.setAttribute('height', SIZE.height);
    chart.lines_drawn = lines;
    if (!all.length) { svg.innerHTML = ''; return; }
    const log = chart.log;
    const scale = log ? Math.log10 : (v) => v;
    const extent = (values) => values.reduce(([l, h], v) => [Math.min(l, v), Math.max(h, v)], [Infinity, -Infinity]);
    let [low, high] = extent(all).map((v) => scale(v));
    // Shares look odd on an axis that starts just below them.
    if (!log && low >= 0 && low < 0.35 * high) low = 0;
    if (low === high) { low -= 0.5; high += 0.5; }
    const pad = (high - low) * 0.05;
    if (log || low !== 0) low -= pad;
    high += pad;
    const [from, to] = extent(lines.flatMap((line) => [line.steps[0], line.steps[line.steps.length - 1]]));
    const span = to - from || 1;
    const right = width - SIZE.right, bottom = SIZE.height - SIZE.bottom;
    const x = (step) => SIZE.left + (step - from) / span * (right - SIZE.left);
    const y = (value) => bottom - (scale(value) - low) / (high - low) * (bottom - SIZE.top);
    const fix = (v) => v.toFixed(1);
    const parts = [];

    if (chart.healthy) {
      const clamp = (v) => Math.max(SIZE.top, Math.min(bottom, v));
      const [least, most] = chart.healthy;
      const top = most === null ? SIZE.top : clamp(log && most <= 0 ? bottom : y(most));
      const base = least === null ? bottom : clamp(log && least <= 0 ? bottom : y(least));
      if (base > top) parts.push(`<rect class="healthy" x="${SIZE.left}" y="${fix(top)}" width="${fix(right - SIZE.left)}" height="${fix(base - top)}"/>`);
      for (const limit of [least, most]) {
        if (limit === null || (log && limit <= 0)) continue;
        const at = y(limit);
        if (at > SIZE.top && at < bottom) parts.push(`<line class="limit" x1="${SIZE.left}" x2="${right}" y1="${fix(at)}" y2="${fix(at)}"/>`);
      }
    }
    for (const value of log ? logTicks(low, high) : ticks(low, high, 5)) {
      const at = y(value);
      if (at < SIZE.top - 1 || at > bottom + 1) continue;
      parts.push(`<line class="axis" x1="${SIZE.left}" x2="${right}" y1="${fix(at)}" y2="${fix(at)}"/>`,
        `<text x="${SIZE.left - 6}" y="${fix(at + 3.5)}" text-anchor="end">${short(value)}</text>`);
    }
    const steps = ticks(from, to, Math.max(2, Math.floor(width / 90)));
    for (const step of steps.filter((s) => Number.isInteger(s))) {
      parts.push(`<text x="${fix(x(step))}" y="${SIZE.height - 6}" text-anchor="middle">${short(step)}</text>`);
    }
    const path = (steps, values) => steps.map((s, i) => `${i ? 'L' : 'M'}${fix(x(s))} ${fix(y(values[i]))}`).join('');
    for (const line of lines) {
      const colour = `k${line.run % COLOURS}`;
      if (smoothing) parts.push(`<path class="raw ${colour}" d="${path(line.steps, line.y)}"/>`);
      const dash = Math.floor(line.run / COLOURS) % 2 ? ' dash' : '';
      parts.push(`<path class="line ${colour}${dash}" d="${path(line.steps, line.soft)}"/>`);
      if (line.steps.length <= 3 || line.e) {
        line.steps.forEach((step, i) => {
          if (line.e) parts.push(`<line class="error ${colour}" x1="${fix(x(step))}" x2="${fix(x(step))}" y1="${fix(y(line.y[i] - line.e[i]))}" y2="${fix(y(line.y[i] + line.e[i]))}"/>`);
          parts.push(`<circle class="dot ${colour}" r="2.5" cx="${fix(x(step))}" cy="${fix(y(line.soft[i]))}"/>`);
        });
      }
    }
    parts.push('<g class="hover"></g>');
    svg.innerHTML = parts.join('');
    chart.place = { x, y, from, to, left: SIZE.left, right, bottom };
    chart.hover = svg.querySelector('.hover');
    rest(chart);
  }

  // What is said beside the name while nothing is pointed at.
  function rest(chart) {
    if (chart.hover) chart.hover.innerHTML = '';
    const line = (chart.lines_drawn || [])[0];
    chart.read.textContent = !many && line ? format(line.soft[line.soft.length - 1]) : '';
  }

  // The values at a step, in every chart.
  function point(at, active, event) {
    for (const chart of charts) {
      if (!chart.place || !chart.lines_drawn.length) continue;
      const { x, y, from, to, bottom } = chart.place;
      if (at < from || at > to) { rest(chart); continue; }
      const dots = [`<line class="cross" x1="${x(at)}" x2="${x(at)}" y1="${SIZE.top}" y2="${bottom}"/>`];
      for (const line of chart.lines_drawn.filter((l) => covers(l, at))) {
        const i = nearest(line.steps, at);
        dots.push(`<circle class="dot k${line.run % COLOURS}" r="3.2" cx="${x(line.steps[i])}" cy="${y(line.soft[i])}"/>`);
        if (!many) chart.read.textContent = format(line.soft[i]);
      }
      chart.hover.innerHTML = dots.join('');
    }
    tip.replaceChildren(make('div', '', `${active.name} · step ${short(Math.round(at))}`));
    for (const line of active.lines_drawn.filter((l) => covers(l, at))) {
      const i = nearest(line.steps, at);
      const step = Math.round(line.steps[i]);
      const row = make('div');
      const label = make('span');
      label.append(make('span', `swatch c${line.run % COLOURS}`), many ? data.runs[line.run] : (smoothing ? 'smoothed' : 'value'));
      const raw = smoothing ? ` (raw ${format(line.y[i])})` : '';
      const elsewhere = step === Math.round(at) ? '' : ` at ${step}`;
      const error = line.e ? ` ± ${format(line.e[i])}` : '';
      row.append(label, make('span', 'num', format(line.soft[i]) + error + raw + elsewhere));
      tip.append(row);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
  }
  function leave() {
    tip.hidden = true;
    charts.forEach(rest);
  }

  function listen(chart) {
    const { svg } = chart;
    const stepsOf = () => data.steps[chart.lines_drawn[0].x];
    svg.addEventListener('pointermove', (event) => {
      if (!chart.place || !chart.lines_drawn.length) return;
      const { left, right, from, to } = chart.place;
      const box = svg.getBoundingClientRect();
      const share = (event.clientX - box.left - left) / (right - left);
      const wanted = from + Math.max(0, Math.min(1, share)) * (to - from);
      const steps = stepsOf();
      point(many ? wanted : steps[nearest(steps, wanted)], chart, event);
    });
    svg.addEventListener('pointerleave', leave);
    svg.addEventListener('blur', leave);
    svg.addEventListener('keydown', (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || !chart.place) return;
      event.preventDefault();
      const steps = stepsOf();
      chart.cursor = Math.max(0, Math.min(steps.length - 1, (chart.cursor ?? steps.length) + move));
      const box = svg.getBoundingClientRect();
      point(steps[chart.cursor], chart, { clientX: box.left + chart.place.x(steps[chart.cursor]), clientY: box.top + 40 });
    });
  }

  function build(spec) {
    const values = spec.lines.flatMap((line) => line.y);
    // What only counts up has nothing to show on such an axis.
    const positive = !['num_tokens', 'epoch'].includes(spec.name) && values.every((v) => v > 0);
    const ratio = positive ? values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)) : 1;
    const chart = { ...spec, log: positive && ratio > 100 };
    const card = make('div', 'chart');
    const head = make('div', 'head');
    chart.read = make('span', 'read num');
    head.append(make('span', 'name', spec.name), chart.read);
    const about = make('div', 'about');
    about.append(make('span', '', spec.about || ''));
    if (positive && ratio > 8) {
      const button = make('button', '', 'log');
      button.type = 'button';
      button.setAttribute('aria-pressed', chart.log);
      button.setAttribute('aria-label', `logarithmic axis for ${spec.name}`);
      button.addEventListener('click', () => {
        chart.log = !chart.log;
        button.setAttribute('aria-pressed', chart.log);
        draw(chart);
      });
      about.append(button);
    }
    chart.plot = make('div', 'plot');
    chart.plot.innerHTML = '<svg tabindex="0" role="img"></svg>';
    chart.svg = chart.plot.firstChild;
    chart.svg.setAttribute('aria-label', `${spec.name} over the steps; arrow keys read values`);
    card.append(head, about, chart.plot);
    charts.push(chart);
    listen(chart);
    return card;
  }

  const tools = make('div', 'tools');
  const label = make('label', '', 'smoothing');
  const slider = make('input');
  Object.assign(slider, { type: 'range', min: 0, max: 0.98, step: 0.02, value: 0 });
  slider.addEventListener('input', () => { smoothing = +slider.value; charts.forEach(draw); });
  label.append(slider);
  tools.append(label, make('span', 'sub', 'against the training step'));
  if (many) {
    const legend = make('div', 'legend');
    data.runs.forEach((name, run) => {
      const entry = make('label');
      const box = make('input');
      Object.assign(box, { type: 'checkbox', checked: true });
      box.addEventListener('change', () => {
        if (box.checked) hidden.delete(run); else hidden.add(run);
        charts.forEach(draw);
      });
      entry.append(box, make('span', `swatch c${run % COLOURS}`), name);
      legend.append(entry);
    });
    tools.append(legend);
  }
  const tip = make('div', 'tip');
  tip.hidden = true;
  document.body.append(tip);
  if (data.groups.length) host.append(tools);
  else host.append(make('p', 'sub', 'No metrics were recorded.'));
  for (const group of data.groups) {
    const section = make('section', 'group');
    section.append(make('h3', '', group.title));
    if (group.charts.length) {
      const grid = make('div', 'grid');
      grid.append(...group.charts.map(build));
      section.append(grid);
    }
    if (group.constant.length) {
      const same = group.constant.map(([name, value]) => `${name} ${value}`).join(' · ');
      section.append(make('p', 'constant', `the same at every step: ${same}`));
    }
    if (group.repeated.length) {
      const same = group.repeated.map(([name, of]) => `${name} is ${of}`).join(' · ');
      section.append(make('p', 'constant', `with the same values: ${same}`));
    }
    host.append(section);
  }
  charts.forEach(draw);
  new ResizeObserver(() => { leave(); charts.forEach(draw); }).observe(host);
  addEventListener('scroll', () => { tip.hidden = true; }, { passive: true });
  // A closed part would be missing on paper.
  addEventListener('beforeprint', () => {
    document.querySelectorAll('details').forEach((part) => { part.open = true; });
  });
})();
