// The theme's colours for canvases, which cannot read CSS variables themselves.
export function colour(name, alpha = 1) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  if (alpha === 1) return value;
  return `${value}${Math.round(alpha * 255)
    .toString(16)
    .padStart(2, "0")}`;
}
