// {{name}}: sums of two numbers, and a reward for the right one.

import { definePlugin, user } from "./sdk/cosmos-plugin.js";

const ANSWER = /<answer>(.*?)<\/answer>/gs;

export default definePlugin({
  name: "{{name}}",
  version: "0.1.0",
  summary: "sums of two numbers",
  // What a run may set in `[custom.{{name}}]`.
  settings: {
    numbers: { type: "integer", default: 10, minimum: 2, maximum: 1000, description: "The numbers are 0 to one less than this." },
    form_credit: { type: "number", default: 0.1, minimum: 0, maximum: 1, description: "Score of a wrong answer in the right form." },
  },
  datasets: {
    train: {
      role: "train",
      // Every pair of numbers. Rows of a file or of the hub come from `table` of the SDK.
      open: ({ numbers }) => ({
        length: numbers ** 2,
        get(index) {
          const [a, b] = [Math.floor(index / numbers), index % numbers];
          const question = `What is ${a} + ${b}? Put the result between <answer> and </answer>.`;
          return { prompt: [user(question)], reference: a + b };
        },
      }),
    },
  },
  rewards: {
    "{{name}}": {
      role: "train",
      // `sample.reference` is what the dataset gave as the example's reference.
      score(sample, settings) {
        const answer = [...sample.completion.matchAll(ANSWER)].at(-1);
        if (answer === undefined) return { value: 0, metrics: { has_answer: 0 } };
        const right = answer[1].trim() === String(sample.reference);
        return { value: right ? 1 : settings.form_credit, metrics: { has_answer: 1 } };
      },
    },
  },
});
