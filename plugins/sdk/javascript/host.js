// What the host lends: the imports of the component, or a stand-in under Node.

const lent = new Map();
/** False while the component is built: the module is evaluated then, without a host. */
let running = true;

export function lend(name, module) {
  lent.set(name, module);
}

/** Called by the build's entry, before the author's module is evaluated. */
export function hold() {
  running = false;
}

/** Called by every function that the host calls first. */
export function start() {
  running = true;
}

export function forget() {
  lent.clear();
}

export function borrow(name) {
  const module = lent.get(name);
  if (module === undefined) {
    throw new Error(`\`${name}\` is not lent here: add it to \`imports\` in plugin.toml, and grant it in the run`);
  }
  if (!running) throw new Error(`\`${name}\` is not there while the plugin is built: call it from a function that the host calls`);
  return module;
}

/** The host's error text, whether it came as a string or in a wrapper with a payload. */
export function refusal(error) {
  if (typeof error === "string") return new Error(error);
  return typeof error?.payload === "string" ? new Error(error.payload) : error;
}

// QuickJS has no console, and WASI's streams cannot be reached from a script.
if (globalThis.console === undefined) {
  const line = (level) => (...words) => {
    if (running) lent.get("log")?.write(level, words.map(shown).join(" "));
  };
  globalThis.console = {
    trace: line("trace"),
    debug: line("debug"),
    log: line("info"),
    info: line("info"),
    warn: line("warn"),
    error: line("error"),
  };
}

function shown(word) {
  if (typeof word !== "object" || word === null || word instanceof Error) return String(word);
  try {
    return JSON.stringify(word);
  } catch {
    return String(word);
  }
}
