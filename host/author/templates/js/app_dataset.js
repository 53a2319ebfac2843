// {{name}}: sums of two numbers.

import { definePlugin, user } from "./sdk/cosmos-plugin.js";

export default definePlugin({
  name: "{{name}}",
  version: "0.1.0",
  summary: "sums of two numbers",
  // What a run may set in `[custom.{{name}}]`.
  settings: {
    numbers: { type: "integer", default: 10, minimum: 2, maximum: 1000, description: "The numbers are 0 to one less than this." },
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
});
