// The SDK under Node: `node --test tests/` in the SDK's folder.

import assert from "node:assert/strict";
import { test } from "node:test";

import { bind } from "../bridge.js";
import { SampleError, assistant, chatTemplate, definePlugin, log, table, user } from "../cosmos-plugin.js";
import { forget, hold, lend } from "../host.js";

const settings = {
  bonus: { type: "number", default: 0.5, minimum: 0, maximum: 1, description: "added for nothing" },
  mode: { enum: ["soft", "hard"], default: "soft" },
  words: { type: "array", items: { type: "string" }, default: ["a"] },
};
const rewards = (rewards) => bind(definePlugin({ name: "p", version: "1", settings, rewards }), ["reward"], [], "app.js").reward;
const sample = (completion, more = {}) => ({ prompt: "", completion, reference: "", metadata: [], ...more });
const thrown = (call) => {
  try {
    call();
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: "nothing was thrown" });
};

test("a reward is a function, or one that is made from the settings", () => {
  const made = rewards({
    plain: { score: (sample) => sample.reference.x },
    open: { role: "filter", open: ({ words }) => (sample) => words.includes(sample.metadata.word) },
    rich: { score: (sample, { bonus }) => ({ value: bonus, metrics: { chars: sample.completion.length } }) },
  });
  made.init("plain", "");
  assert.deepEqual(made.scoreBatch([sample("", { reference: '{"x":2}' })]), [{ tag: "ok", val: { value: 2, metrics: [] } }]);
  made.init("open", "{}");
  const word = sample("", { metadata: [{ key: "word", value: "a" }] });
  assert.equal(made.scoreBatch([word])[0].val.value, 1);
  made.init("rich", '{"custom":{"p":{"bonus":1}}}');
  assert.deepEqual(made.scoreBatch([sample("abc")])[0].val, { value: 1, metrics: [{ name: "chars", value: 3 }] });
});

test("an exception is the error of its sample, with name, message and line", () => {
  const made = rewards({
    r: {
      score(sample) {
        if (sample.completion === "give up") throw new SampleError("no reference");
        if (sample.completion === "text") throw "a text";
        if (sample.completion === "nothing") return /** @type {any} */ (undefined);
        return sample.reference.x;
      },
    },
  });
  made.init("r", "");
  const [first, second, third, fourth] = made.scoreBatch(["", "give up", "text", "nothing"].map((text) => sample(text)));
  assert.match(first.val.message, /^TypeError: .*null.* \(sdk\.test\.mjs:\d+ in `.*score`\)$/);
  assert.equal(second.val.message, "no reference");
  assert.equal(third.val.message, "a text");
  assert.match(fourth.val.message, /the score is undefined, not a number/);
});

test("random numbers do not depend on earlier samples", () => {
  const made = rewards({ r: { score: () => Math.random() + Math.random() } });
  made.init("r", "");
  const values = made.scoreBatch([sample(""), sample(""), sample("")]).map((one) => one.val.value);
  assert.equal(new Set(values).size, 1);
  assert.ok(values[0] > 0 && values[0] < 2);
});

test("settings are checked", () => {
  const made = rewards({ r: { score: (_, { bonus }) => bonus } });
  for (const [own, said] of [
    [{ bonsu: 1 }, "has no setting `bonsu`: it has `bonus`"],
    [{ bonus: "x" }, '`custom.p.bonus` is "x", not a number'],
    [{ bonus: 2 }, "above 1"],
    [{ mode: "odd" }, 'choose "soft" or "hard"'],
    [{ words: [1] }, "`custom.p.words[0]` is 1, not a text"],
    [{ words: "a" }, "not a list"],
  ]) {
    assert.ok(thrown(() => made.init("r", JSON.stringify({ custom: { p: own } }))).includes(said), said);
  }
  assert.equal(thrown(() => made.init("other", "")), "no reward `other` here: choose `r`");
  assert.match(thrown(() => made.init("r", "{")), /not JSON/);
});

test("what a plugin offers", () => {
  const plugin = definePlugin({
    name: "p",
    version: "1",
    summary: "s",
    settings,
    wants: ["dir:/data:ro"],
    datasets: { d: { role: "validation", open: () => [] } },
    rewards: { r: { role: "filter", score: () => 1 } },
  });
  const described = bind(plugin, ["dataset", "reward"], ["log"], "app.js").metadata.describe();
  const { settingsSchema, ...rest } = described;
  assert.deepEqual(rest, {
    name: "p",
    version: "1",
    summary: "s",
    datasets: [{ name: "d", role: "validation" }],
    rewards: [{ name: "r", role: "filter" }],
    environments: [],
    wants: ["log", "dir:/data:ro"],
  });
  assert.deepEqual(JSON.parse(settingsSchema).properties.custom.properties.p.properties, settings);
});

test("mistakes in a definition are said while it is built", () => {
  for (const [definition, said] of [
    [undefined, /takes an object/],
    [{ name: "a b", version: "1" }, /not a plugin's name/],
    [{ name: "p" }, /`version` is missing/],
    [{ name: "p", version: "1", reward: {} }, /takes no `reward`/],
    [{ name: "p", version: "1", settings: { x: { type: "number" } } }, /no default/],
    [{ name: "p", version: "1", settings: { x: { type: "number", default: "1" } } }, /settings.x.default/],
    [{ name: "p", version: "1", rewards: { r: { role: "test", score: () => 1 } } }, /choose train or validation or filter/],
    [{ name: "p", version: "1", rewards: { r: {} } }, /needs either/],
    [{ name: "p", version: "1", datasets: { d: { score: () => 1 } } }, /needs `open/],
  ]) {
    assert.throws(() => definePlugin(/** @type {any} */ (definition)), said);
  }
  const plugin = definePlugin({ name: "p", version: "1", rewards: { r: { score: () => 1 } } });
  assert.throws(() => bind(plugin, ["dataset", "reward"], [], "app.js"), /defines no `datasets`/);
  assert.throws(() => bind(plugin, [], [], "app.js"), /add "reward" to `exports`/);
  assert.throws(() => bind(undefined, ["reward"], [], "app.js"), /no default export/);
});

test("rows become examples", () => {
  const rows = Array.from({ length: 100 }, (_, at) => ({ q: String(at), other: 0 }));
  const asked = [];
  const lent = {
    open(source) {
      asked.push(source);
      if (source.name === "missing") throw "no such dataset";
      return {
        len: () => 100n,
        columns: () => ["q", "other"],
        read: (start, count, columns) =>
          rows.slice(Number(start), Number(start) + count).map((row) => JSON.stringify(columns.length ? { q: row.q } : row)),
      };
    },
  };
  const plugin = definePlugin({
    name: "p",
    version: "1",
    datasets: {
      d: {
        open(_, run) {
          const open = table.open(run.dataset, { columns: ["q"] });
          return {
            length: run.dataset.limit(open.length),
            get: (index) => ({ prompt: [user(open.get(index).q)], reference: { index }, metadata: { k: "v" } }),
          };
        },
      },
      list: { open: () => [{ prompt: "text" }, { prompt: [assistant("x")], response: "y" }] },
    },
  });
  const made = bind(plugin, ["dataset"], ["table"], "app.js").dataset;
  const given = (name) => JSON.stringify({ dataset: { name, split: "train", test_size: 3 } });
  forget();
  assert.match(thrown(() => made.init("d", given("n"))), /add it to `imports`/);
  lend("table", lent);
  assert.match(thrown(() => made.init("d", given("missing"))), /no such dataset/);
  assert.match(thrown(() => made.init("d", "")), /`dataset.name` is empty/);
  made.init("d", given("n"));
  assert.deepEqual(asked.at(-1), { name: "n", subset: "", revision: "", splits: ["train"] });
  assert.equal(Number(made.len()), 3);
  const [first, beyond] = made.getBatch([2n, 3n]);
  assert.deepEqual(first.val, {
    prompt: { tag: "messages", val: [{ role: "user", content: "2" }] },
    reference: '{"index":2}',
    response: null,
    metadata: [{ key: "k", value: "v" }],
  });
  assert.match(beyond.val.message, /RangeError: example 3 of 3/);
  made.init("list", "");
  assert.deepEqual(made.getBatch([0])[0].val.prompt, { tag: "text", val: "text" });
  assert.equal(made.getBatch([1])[0].val.response, "y");
  assert.throws(() => table.open("n", { columns: ["z"] }), /no column `z`; it has q, other/);
  assert.equal([...table.open("n")].length, 100);
});

test("an environment's state travels as JSON", () => {
  const plugin = definePlugin({
    name: "p",
    version: "1",
    environments: {
      e: {
        open: () => ({
          reset: (start) => ({ messages: start.messages, tools: [{ name: "t" }], state: { left: start.reference.n, text: "é😀" } }),
          step: ({ state, turn }) =>
            state.left > 1 ? { messages: [user(state.text)], state: { left: state.left - 1 } } : { done: true, reward: 1, metrics: { turn } },
        }),
      },
    },
  });
  const made = bind(plugin, ["environment"], [], "app.js").environment;
  made.init("e", "");
  const messages = [{ role: "user", content: "q" }];
  const opened = made.resetBatch([{ messages, reference: '{"n":2}', metadata: [] }])[0].val;
  assert.deepEqual([opened.messages, opened.tools], [messages, '[{"name":"t"}]']);
  const first = made.stepBatch([{ state: opened.state, completion: "", turn: 0, complete: true }])[0].val;
  assert.deepEqual([first.messages, first.done], [[{ role: "user", content: "é😀" }], false]);
  const [last, broken] = made.stepBatch([
    { state: first.state, completion: "", turn: 1, complete: true },
    { state: new Uint8Array(), completion: "", turn: 1, complete: true },
  ]);
  assert.deepEqual([last.val.done, last.val.reward, last.val.metrics], [true, 1, [{ name: "turn", value: 1 }]]);
  assert.match(broken.val.message, /TypeError/);
});

test("log and chat template", () => {
  forget();
  assert.throws(() => log.info("x"), /`log` is not lent here/);
  const lines = [];
  lend("log", { write: (level, message) => lines.push(`${level}: ${message}`) });
  log.warn("x");
  assert.deepEqual(lines, ["warn: x"]);
  hold();
  assert.throws(() => log.info("y"), /not there while the plugin is built/);
  bind(definePlugin({ name: "p", version: "1" }), [], [], "app.js").metadata.describe();
  log.info("z");
  assert.deepEqual(lines, ["warn: x", "info: z"]);
  lend("chat-template", { render: (messages, add, options) => `${messages.length} ${add} ${options}` });
  assert.equal(chatTemplate.render([user("q")], false, { enable_thinking: true }), '1 false {"enable_thinking":true}');
});
