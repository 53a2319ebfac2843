// What an author imports. Types and descriptions are in cosmos-plugin.d.ts.

import { borrow, refusal } from "./host.js";
import { checkDefinition } from "./definition.js";

export { SampleError } from "./errors.js";

export function definePlugin(definition) {
  checkDefinition(definition);
  return definition;
}

export const system = (content) => ({ role: "system", content });
export const user = (content) => ({ role: "user", content });
export const assistant = (content) => ({ role: "assistant", content });

const write = (level) => (message) => borrow("log").write(level, String(message));
export const log = {
  trace: write("trace"),
  debug: write("debug"),
  info: write("info"),
  warn: write("warn"),
  error: write("error"),
};

/** Rows of one call to the host. */
const ROWS_MAX = 64;

class Rows {
  #rows;
  #wanted;

  constructor(rows, wanted) {
    this.#rows = rows;
    this.#wanted = [...wanted];
    this.length = Number(rows.len());
    this.columns = rows.columns();
    const missing = this.#wanted.find((name) => !this.columns.includes(name));
    if (missing !== undefined) {
      throw new Error(`the table has no column \`${missing}\`; it has ${this.columns.join(", ")}`);
    }
  }

  get(index) {
    if (!(index >= 0 && index < this.length)) throw new RangeError(`row ${index} of ${this.length}`);
    return this.read(index, 1)[0];
  }

  read(start, count) {
    try {
      return this.#rows.read(start, count, this.#wanted).map((row) => JSON.parse(row));
    } catch (error) {
      throw refusal(error);
    }
  }

  *[Symbol.iterator]() {
    for (let start = 0; start < this.length; start += ROWS_MAX) {
      yield* this.read(start, Math.min(ROWS_MAX, this.length - start));
    }
  }
}

export const table = {
  open(source, options = {}) {
    const section = typeof source === "string" ? { name: source } : source;
    if (!section.name) throw new Error("`dataset.name` is empty: name a hub dataset, a folder or a file");
    const splits = options.splits ?? section.splits ?? [];
    const asked = {
      name: section.name,
      subset: options.subset ?? section.subset ?? "",
      revision: options.revision ?? section.revision ?? "",
      splits: [...splits],
    };
    const host = borrow("table");
    let rows;
    try {
      rows = host.open(asked);
    } catch (error) {
      throw refusal(error);
    }
    return new Rows(rows, options.columns ?? []);
  },
};

export const chatTemplate = {
  render(messages, addGenerationPrompt = true, options = {}) {
    const host = borrow("chat-template");
    try {
      return host.render([...messages], addGenerationPrompt, JSON.stringify(options));
    } catch (error) {
      throw refusal(error);
    }
  },
};
