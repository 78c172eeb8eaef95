// Numbers and times as people read them; "–" where there is none.
export const NONE = "–";
const two = (value) => String(value).padStart(2, "0");
const known = (value) => Number.isFinite(value);

export function clock(seconds) {
  if (!known(seconds)) return NONE;
  const date = new Date(seconds * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function whole(value) {
  return known(value) ? Math.round(value).toLocaleString("en-US") : NONE;
}

// 0.987 -> "98.7"
export function percent(value) {
  return known(value) ? (value * 100).toFixed(value === 1 || value === 0 ? 0 : 1) : NONE;
}

export function seconds(value) {
  if (!known(value)) return NONE;
  if (Math.abs(value) < 9.95) return value.toFixed(1);
  return String(Math.round(value));
}

// 1234 -> "1.2k"
export function short(value) {
  if (!known(value)) return NONE;
  for (const [size, unit] of [
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ]) {
    if (Math.abs(value) >= size) return trimmed(value / (unit === "k" ? 1e3 : size)) + unit;
  }
  return Math.abs(value) < 10 ? trimmed(value) : whole(value);
}

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${trimmed(size)} ${units[unit]}`;
}

function trimmed(value) {
  return value.toFixed(value < 100 ? 1 : 0).replace(/\.0$/, "");
}
