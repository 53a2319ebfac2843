// Between what componentize-qjs expects of a world's module and what the author defined.

import { SampleError, explain } from "./errors.js";
import { start } from "./host.js";
import { parseSettings, schemaText } from "./settings.js";

const KINDS = ["dataset", "reward", "environment"];

/**
 * The objects that the entry module exports: `metadata`, and one of each of `exports`.
 * `exported` and `imports` are those of plugin.toml, `source` is the author's file, for messages.
 */
export function bind(plugin, exported, imports, source) {
  if (plugin === undefined || plugin === null) throw new Error(`${source} has no default export: write \`export default definePlugin({…})\``);
  for (const kind of KINDS) {
    const some = Object.keys(plugin[`${kind}s`] ?? {}).length > 0;
    if (exported.includes(kind) && !some) throw new Error(`plugin.toml exports \`${kind}\`, but ${source} defines no \`${kind}s\``);
    if (some && !exported.includes(kind)) throw new Error(`${source} defines \`${kind}s\`: add "${kind}" to \`exports\` in plugin.toml`);
  }
  const made = { metadata: metadata(plugin, imports) };
  if (exported.includes("dataset")) made.dataset = dataset(plugin);
  if (exported.includes("reward")) made.reward = reward(plugin);
  if (exported.includes("environment")) made.environment = environment(plugin);
  return made;
}

function metadata(plugin, imports) {
  const offers = (kind) => Object.entries(plugin[kind] ?? {});
  return {
    describe() {
      start();
      return {
        name: plugin.name,
        version: plugin.version,
        summary: plugin.summary ?? "",
        datasets: offers("datasets").map(([name, { role = "train" }]) => ({ name, role })),
        rewards: offers("rewards").map(([name, { role = "train" }]) => ({ name, role })),
        environments: offers("environments").map(([name]) => ({ name })),
        settingsSchema: schemaText(plugin.name, plugin.settings),
        wants: [...new Set([...imports, ...(plugin.wants ?? [])])],
      };
    },
  };
}

/** What `init` chose; a string is thrown, since that is how a WIT error leaves a function. */
function opening(plugin, kind, open) {
  let chosen;
  return {
    init(name, settings) {
      start();
      try {
        const offers = plugin[`${kind}s`];
        if (!Object.hasOwn(offers, name)) {
          throw new SampleError(`no ${kind} \`${name}\` here: choose ${Object.keys(offers).map((one) => `\`${one}\``).join(", ")}`);
        }
        const { own, run } = parseSettings(plugin.name, plugin.settings, settings);
        chosen = open(offers[name], own, run);
      } catch (error) {
        throw explain(error);
      }
    },
    need() {
      if (chosen === undefined) throw new Error("`init` was not called");
      return chosen;
    },
  };
}

/** Numbers of a small generator that starts anew with each item: a score must not depend on what was scored before. */
let randomState = 1;
Math.random = () => {
  randomState = (randomState + 0x6d2b79f5) | 0;
  let mixed = Math.imul(randomState ^ (randomState >>> 15), 1 | randomState);
  mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
  return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
};

function each(items, work) {
  const results = [];
  for (const item of items) {
    randomState = 1;
    try {
      results.push({ tag: "ok", val: work(item) });
    } catch (error) {
      results.push({ tag: "err", val: { message: explain(error) } });
    }
  }
  return results;
}

const pairs = (object) => Object.entries(object ?? {}).map(([key, value]) => ({ key, value: String(value) }));
const mapping = (list) => Object.fromEntries(list.map(({ key, value }) => [key, value]));
const metrics = (object, place) => Object.entries(object ?? {}).map(([name, value]) => ({ name, value: number(value, `${place} \`${name}\``) }));
const parsed = (text) => (text === "" ? null : JSON.parse(text));

function number(value, place) {
  if (typeof value === "boolean") return value ? 1 : 0;
  if (typeof value !== "number") throw new TypeError(`${place} is ${String(value).slice(0, 100)}, not a number`);
  return value;
}

function messages(list, place) {
  return [...list].map((message) => {
    if (typeof message?.role !== "string" || typeof message.content !== "string") {
      throw new TypeError(`${place} holds something else than messages with \`role\` and \`content\``);
    }
    return { role: message.role, content: message.content };
  });
}

function dataset(plugin) {
  const opened = opening(plugin, "dataset", (offer, own, run) => offer.open(own, run));
  const example = (index) => {
    const rows = opened.need();
    const at = Number(index);
    if (!(at < rows.length)) throw new RangeError(`example ${at} of ${rows.length}`);
    const made = typeof rows.get === "function" ? rows.get(at) : rows[at];
    const prompt = made.prompt;
    return {
      prompt: typeof prompt === "string" ? { tag: "text", val: prompt } : { tag: "messages", val: messages(prompt, "the prompt") },
      reference: made.reference === undefined || made.reference === null ? null : JSON.stringify(made.reference),
      response: made.response ?? null,
      metadata: pairs(made.metadata),
    };
  };
  return {
    init: opened.init,
    len() {
      try {
        return opened.need().length;
      } catch (error) {
        throw explain(error);
      }
    },
    getBatch: (indices) => each(indices, example),
  };
}

function reward(plugin) {
  const scorer = (offer, own, run) => (offer.open ? offer.open(own, run) : (sample) => offer.score(sample, own, run));
  const opened = opening(plugin, "reward", scorer);
  const score = (given) => {
    const made = opened.need()(new LazySample(given));
    if (typeof made !== "object" || made === null) return { value: number(made, "the score"), metrics: [] };
    return { value: number(made.value, "the score"), metrics: metrics(made.metrics, "the metric") };
  };
  return { init: opened.init, scoreBatch: (samples) => each(samples, score) };
}

/** Parses what a reward asks for, once, and nothing else. */
class LazySample {
  #given;
  #reference;
  #metadata;

  constructor(given) {
    this.#given = given;
    this.prompt = given.prompt;
    this.completion = given.completion;
  }

  get reference() {
    if (this.#reference === undefined) this.#reference = parsed(this.#given.reference);
    return this.#reference;
  }

  get metadata() {
    return (this.#metadata ??= mapping(this.#given.metadata));
  }
}

function environment(plugin) {
  const opened = opening(plugin, "environment", (offer, own, run) => offer.open(own, run));
  const reset = (start) => {
    const given = { messages: start.messages, reference: parsed(start.reference), metadata: mapping(start.metadata) };
    const made = opened.need().reset(given);
    return {
      messages: messages(made.messages, "what `reset` returned"),
      tools: made.tools?.length ? JSON.stringify(made.tools) : "",
      state: pack(made.state),
    };
  };
  const step = ({ state, completion, turn, complete }) => {
    const made = opened.need().step({ completion, turn, complete, state: unpack(state) });
    return {
      messages: messages(made.messages ?? [], "what `step` returned"),
      state: pack(made.state),
      done: made.done ?? false,
      reward: number(made.reward ?? 0, "the reward"),
      metrics: metrics(made.metrics, "the metric"),
    };
  };
  return { init: opened.init, resetBatch: (starts) => each(starts, reset), stepBatch: (actions) => each(actions, step) };
}

/** QuickJS has no TextEncoder: JSON is escaped to ASCII instead. */
function pack(state) {
  if (state === undefined || state === null) return new Uint8Array();
  const text = JSON.stringify(state).replace(/[\u0080-\uffff]/g, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return Uint8Array.from(text, (char) => char.charCodeAt(0));
}

function unpack(state) {
  if (state.length === 0) return null;
  let text = "";
  for (const byte of state) text += String.fromCharCode(byte);
  return JSON.parse(text);
}
