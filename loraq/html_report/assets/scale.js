// Scales, ticks and the colour map.

function niceStep(span, count) {
  const rough = span / count,
    power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

function scale(low, high, logarithmic, from, to) {
  const map = logarithmic ? Math.log : (value) => value;
  const a = map(low),
    b = map(high);
  const at = (value) => from + ((map(value) - a) / (b - a)) * (to - from);
  return { at, ticks: logarithmic ? logTicks(low, high) : linearTicks(low, high) };
}

function linearTicks(low, high, count = 5) {
  const step = niceStep(high - low, count),
    decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place++) {
    ticks.push({
      value: place * step,
      text: (place * step)
        .toFixed(decimals)
        .replace("-", "−")
        .replace(/^−(0\.?0*)$/, "$1"),
    });
  }
  return ticks;
}

function logTicks(low, high) {
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.log10(high) + 1; power++) {
      for (const factor of factors) {
        const value = factor * 10 ** power;
        if (value >= low && value <= high) ticks.push({ value, text: String(Number(value.toPrecision(3))) });
      }
    }
    if (ticks.length >= 3) return ticks;
  }
  return linearTicks(low, high);
}

// Room around the data: a tenth of the span, which is at least `least`.
function padded(values, logarithmic, least) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (logarithmic) {
    const room = Math.max(Math.log(high / low) * 0.1, Math.log(1.15));
    return [low * Math.exp(-room), high * Math.exp(room)];
  }
  const span = Math.max(high - low, least),
    middle = (high + low) / 2;
  return [middle - span * 0.6, middle + span * 0.6];
}

const sizeText = (bytes) => {
  for (const unit of ["B", "kB", "MB"]) {
    if (Math.abs(bytes) < 1000) return `${unit === "B" ? bytes : bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(2)} GB`;
};

// viridis (Smith and van der Walt, CC0) at eleven places: perceptually uniform, and monotone in lightness.
const viridis = [
  "440154",
  "482475",
  "414487",
  "355f8d",
  "2a788e",
  "21918c",
  "22a884",
  "44bf70",
  "7ad151",
  "bddf26",
  "fde725",
].map((code) => [0, 2, 4].map((at) => parseInt(code.slice(at, at + 2), 16)));
function colour(share) {
  // 0 is the page's end: dark on a dark page, light on a light one
  const at = (isDark() ? share : 1 - share) * (viridis.length - 1),
    left = Math.min(Math.floor(at), viridis.length - 2);
  const mixed = viridis[left].map((value, channel) =>
    Math.round(value + (viridis[left + 1][channel] - value) * (at - left)),
  );
  return `rgb(${mixed.join(" ")})`;
}
const short = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(2);
  return size >= 1000 ? String(Math.round(value)) : value.toPrecision(3);
};
