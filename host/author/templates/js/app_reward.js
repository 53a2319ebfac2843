// {{name}}: is the answer between <answer> and </answer> the right one?

import { definePlugin } from "./sdk/cosmos-plugin.js";

const ANSWER = /<answer>(.*?)<\/answer>/gs;

export default definePlugin({
  name: "{{name}}",
  version: "0.1.0",
  summary: "rewards the right answer",
  // What a run may set in `[custom.{{name}}]`.
  settings: {
    form_credit: { type: "number", default: 0.1, minimum: 0, maximum: 1, description: "Score of a wrong answer in the right form." },
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
