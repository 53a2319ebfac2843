// Rewards the form of a completion and its length, whatever it says: to be weighed beside a reward for being right.

import { definePlugin } from "../../../plugins/sdk/javascript/cosmos-plugin.js";
import { answerOnly, matching, openThinkAnswer, thinkAnswer } from "./form.js";
import { chars, nearTarget, softOverlong } from "./length.js";

const settings = /** @type {const} */ ({
  form: {
    enum: ["think-answer", "open-think-answer", "answer", "regex"],
    default: "think-answer",
    description: "think-answer: <think>…</think><answer>…</answer> and nothing else; open-think-answer: the same after a template that opens <think>; answer: one <answer>…</answer> anywhere; regex: `pattern` matches.",
  },
  pattern: { type: "string", default: "", description: "For form = \"regex\": a JavaScript regular expression; its group `answer`, or its first, is the answer." },
  form_reward: { type: "number", default: 1, minimum: -100, maximum: 100, description: "Score of the right form." },
  form_penalty: { type: "number", default: 0, minimum: -100, maximum: 100, description: "Score of another form." },
  length: {
    enum: ["none", "target", "soft-overlong"],
    default: "soft-overlong",
    description: "none: length does not matter; target: best at `target_chars`; soft-overlong: a growing penalty before `max_chars`, as in DAPO.",
  },
  length_weight: { type: "number", default: 1, minimum: 0, maximum: 100, description: "Factor of the length's part." },
  target_chars: { type: "integer", default: 1000, minimum: 1, maximum: 1000000, description: "For length = \"target\"." },
  tolerance_chars: { type: "integer", default: 1000, minimum: 1, maximum: 1000000, description: "For length = \"target\": so far from it the length's part is 0." },
  max_chars: { type: "integer", default: 16000, minimum: 1, maximum: 1000000, description: "For length = \"soft-overlong\": from here on the penalty is whole." },
  soft_chars: { type: "integer", default: 4000, minimum: 1, maximum: 1000000, description: "For length = \"soft-overlong\": so long before `max_chars` it begins." },
});

/** @typedef {import("../../../plugins/sdk/javascript/cosmos-plugin.js").SettingsOf<typeof settings>} Settings */

/** @param {Settings} given */
function chosenForm({ form, pattern }) {
  switch (form) {
    case "think-answer":
      return thinkAnswer;
    case "open-think-answer":
      return openThinkAnswer;
    case "answer":
      return answerOnly;
    case "regex":
      if (pattern === "") throw new Error("`form` is \"regex\", but `pattern` is empty");
      return matching(pattern);
  }
}

/** @param {Settings} given */
function chosenLength(given) {
  switch (given.length) {
    case "none":
      return () => 0;
    case "target":
      return (/** @type {number} */ length) => nearTarget(length, given.target_chars, given.tolerance_chars);
    case "soft-overlong":
      if (given.soft_chars > given.max_chars) throw new Error("`soft_chars` is above `max_chars`");
      return (/** @type {number} */ length) => softOverlong(length, given.max_chars, given.soft_chars);
  }
}

export default definePlugin({
  name: "format-length",
  version: "0.1.0",
  summary: "rewards the form and the length of a completion",
  settings,
  rewards: {
    "format-length": {
      role: "train",
      open(given) {
        const form = chosenForm(given);
        const worth = chosenLength(given);
        return ({ completion }) => {
          const answer = form(completion);
          const length = chars(completion);
          const lengthScore = given.length_weight * worth(length);
          const formScore = answer === null ? given.form_penalty : given.form_reward;
          const metrics = {
            format_ok: answer === null ? 0 : 1,
            format_score: formScore,
            length_chars: length,
            length_score: lengthScore,
            answer_chars: answer === null ? 0 : chars(answer),
          };
          return { value: formScore + lengthScore, metrics };
        };
      },
    },
    "format-ok": {
      role: "validation",
      open(given) {
        const form = chosenForm(given);
        return ({ completion }) => {
          const length = chars(completion);
          const ok = form(completion) === null ? 0 : 1;
          return { value: ok, metrics: { format_ok: ok, length_chars: length } };
        };
      },
    },
  },
});
