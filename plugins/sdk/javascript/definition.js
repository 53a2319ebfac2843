// Whether a definition is one: said while the plugin is built, not when a run starts.

import { check } from "./settings.js";

const ROLES = { datasets: ["train", "validation"], rewards: ["train", "validation", "filter"], environments: [undefined] };
const KEYS = ["name", "version", "summary", "settings", "wants", "datasets", "rewards", "environments"];

export function checkDefinition(definition) {
  if (typeof definition !== "object" || definition === null) throw new TypeError("definePlugin takes an object");
  for (const key of Object.keys(definition)) {
    if (!KEYS.includes(key)) throw new TypeError(`definePlugin takes no \`${key}\`: it takes ${KEYS.join(", ")}`);
  }
  if (!/^[A-Za-z0-9_-]+$/.test(definition.name ?? "")) {
    throw new TypeError(`\`${definition.name}\` is not a plugin's name: use letters, digits, \`-\` and \`_\``);
  }
  if (typeof definition.version !== "string") throw new TypeError('`version` is missing, for example "0.1.0"');
  for (const [key, schema] of Object.entries(definition.settings ?? {})) {
    if (schema.default === undefined) throw new TypeError(`setting \`${key}\` has no default: a run may leave any setting out`);
    check(schema, schema.default, `settings.${key}.default`);
  }
  for (const kind of Object.keys(ROLES)) {
    for (const [name, offer] of Object.entries(definition[kind] ?? {})) checkOffer(kind, name, offer);
  }
}

function checkOffer(kind, name, offer) {
  const place = `${kind}.${name}`;
  const roles = ROLES[kind];
  const role = offer.role ?? roles[0];
  if (!roles.includes(role)) {
    throw new TypeError(`\`${place}.role\` is \`${role}\`: choose ${roles.filter(Boolean).join(" or ") || "none"}`);
  }
  const functions = ["open", "score"].filter((key) => typeof offer[key] === "function");
  const wanted = kind === "rewards" ? "either `score(sample, settings)` or `open(settings)`" : "`open(settings)`";
  if (functions.length !== 1 || (kind !== "rewards" && functions[0] !== "open")) {
    throw new TypeError(`\`${place}\` needs ${wanted}`);
  }
}
