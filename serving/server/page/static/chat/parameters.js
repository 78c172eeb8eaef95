// The settings of a request: their bounds as the server has them, and what stands where none is given.
const MOST = 2 ** 31 - 1;

export const PARAMETERS = [
  { name: "temperature", least: 0, most: 2 },
  { name: "top_p", least: 0, most: 1 },
  { name: "top_k", least: 0, most: MOST, whole: true },
  { name: "max_tokens", least: 1, most: MOST, whole: true },
  { name: "seed", least: -Number.MAX_SAFE_INTEGER, most: Number.MAX_SAFE_INTEGER, whole: true },
  { name: "slo_s", least: 0, most: 1e9, above: true },
];

// The server's own value, or null where it has no single one.
export function serverDefault(name, settings) {
  if (name === "max_tokens") return settings.limits?.max_tokens ?? null;
  if (name === "slo_s") return settings.slo_s ?? null;
  return settings.defaults?.[name] ?? null;
}

// {value} of what was typed, null for an empty text; {error: name of words, values} where it does not fit.
export function readParameter({ least, most, whole, above }, text) {
  const typed = text.trim().replace(",", ".");
  if (typed === "") return { value: null };
  const value = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(typed) ? Number(typed) : NaN;
  const fits = value >= least && value <= most && !(above && value === least);
  if (fits && (!whole || Number.isInteger(value))) return { value };
  const bounded = most < MOST && !above;
  let error = whole ? "parameter.whole" : "parameter.number";
  if (above) error = "parameter.above";
  else if (!bounded) error += least < 0 ? "" : ".least";
  return { error, values: { least, most } };
}

// Those that are set, as fields of a request.
export function requestFields(parameters) {
  const fields = {};
  for (const { name } of PARAMETERS) {
    if (parameters[name] !== null && parameters[name] !== undefined) fields[name] = parameters[name];
  }
  return fields;
}

// Those of `values` that are fit to be sent; what comes from a file may hold anything.
export function fitParameters(values) {
  const fit = {};
  for (const parameter of PARAMETERS) {
    const given = values?.[parameter.name];
    if (typeof given !== "number") continue;
    const { value, error } = readParameter(parameter, String(given));
    if (!error) fit[parameter.name] = value;
  }
  return fit;
}
